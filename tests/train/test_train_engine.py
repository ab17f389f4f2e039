"""The engine on one rank: it steps as plain PyTorch does, however the batch is cut and the states
partitioned."""

import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoTokenizer

from model import InfiMMHD
from train.config import TrainConfig
from train.data import Sample
from train.engine import run
from train.optim import learning_rate, parameter_groups

from .tiny_stage import ALL_PARTS, assert_weights_close, reader_of, tiny_model, weights_of


def plain_pytorch(config: TrainConfig, dataset, tokenizer) -> tuple[list[float], dict]:
    """The stage written without DeepSpeed: whole batches, one process."""
    model = tiny_model()
    model.set_window_size(config.image.window_size)
    model.set_trainable(config.trainable)
    reader = reader_of(config, dataset, tokenizer, config.parallel.global_batch_size)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer), betas=config.optimizer.betas, eps=config.optimizer.eps
    )
    losses = []
    for step in range(config.schedule.steps):
        (batch,) = reader(step).micro_batches
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config.optimizer, config.schedule)
        loss = model(**batch).loss
        loss.backward()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.sample(3)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_equal_plain_pytorch(tiny, colours, tokenizer, zero_stage, accumulation):
    """A micro-batch's mean is not the batch's when answers differ in length, and DeepSpeed averages over
    accumulation steps: both must be undone."""
    config = tiny(
        "CPT",
        trainable=ALL_PARTS,
        image__mode="dynamic",
        parallel__zero_stage=zero_stage,
        parallel__gradient_accumulation_steps=accumulation,
    )
    losses, weights = plain_pytorch(config, colours, tokenizer)
    result = run(config, dataset=colours, tokenizer=tokenizer, model=tiny_model())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert_weights_close(weights_of(result.output_dir), weights)


@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [("bf16", 1), ("bf16", 2), ("bf16", 3), ("bf16_autocast", 0), ("bf16_autocast", 2), ("bf16_autocast", 3)],
)
def test_half_precision_follows_fp32(tiny, colours, tokenizer, precision, zero_stage):
    """Over ten seeds 8 steps in half precision were off by 0.1 to 1.8 %, as eager autocast is."""
    config = tiny(
        "CPT",
        trainable=ALL_PARTS,
        schedule__steps=8,
        parallel__precision=precision,
        parallel__zero_stage=zero_stage,
    )
    losses, _ = plain_pytorch(config, colours, tokenizer)
    result = run(config, dataset=colours, tokenizer=tokenizer, model=tiny_model())
    assert result.losses == pytest.approx(losses, rel=0.02)
    assert result.losses != pytest.approx(losses, rel=1e-6), "the computation was not in half precision"


def test_autocast_keeps_fp32_weights_and_does_not_outlast_its_run(tiny, colours, tokenizer):
    """DeepSpeed keeps a process-wide note that autocast was asked for."""
    config = tiny("CPT", parallel__precision="bf16_autocast")
    model = tiny_model()
    run(config, dataset=colours, tokenizer=tokenizer, model=model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = tiny("CPT", checkpoint__resume=False)
    losses, _ = plain_pytorch(config, colours, tokenizer)
    result = run(config, dataset=colours, tokenizer=tokenizer, model=tiny_model())
    assert result.losses == pytest.approx(losses, rel=1e-5)


def test_zero_3_leaves_the_process_as_it_was(tiny, colours, tokenizer):
    """DeepSpeed puts its own `linear` in the place of torch's: later stages and models of the same process
    ran on it, with other operations."""
    linear = torch.nn.functional.linear
    run(tiny("PT", parallel__zero_stage=3, schedule__steps=1), dataset=colours, tokenizer=tokenizer)
    assert torch.nn.functional.linear is linear


def test_gradient_checkpointing_changes_no_step(tiny, colours, tokenizer):
    config = tiny("DRA", parallel__gradient_accumulation_steps=2)
    assert config.gradient_checkpointing
    losses, weights = plain_pytorch(config, colours, tokenizer)
    model = tiny_model()
    result = run(config, dataset=colours, tokenizer=tokenizer, model=model)
    assert model.gradient_checkpointing
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert_weights_close(weights_of(result.output_dir), weights)


@pytest.mark.parametrize("recipe", ["PT", "CPT", "DRA", "IFT"])
def test_frozen_parts_stay_bit_identical_and_the_others_learn(tiny, colours, tokenizer, recipe):
    config = tiny(recipe)
    model = tiny_model()
    model.set_window_size(config.image.window_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {
        name
        for part, members in model.parameter_groups().items()
        if part in config.trainable
        for name, _ in members
    }
    result = run(config, dataset=colours, tokenizer=tokenizer, model=model)
    after = weights_of(result.output_dir)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in trainable), name
        assert torch.equal(model.state_dict()[name], after[name]), f"{name} was not trained in place"


def test_stages_hand_over(tiny, colours, tokenizer, tmp_path):
    """PT at 28 px, CPT at 56 from its folder in the same process: weights, tokenizer, enlarged table."""
    first = run(tiny("PT"), dataset=colours, tokenizer=tokenizer)
    assert not list(first.output_dir.glob(".*"))
    # a learning rate too small to move anything shows what the next stage started from
    config = tiny("CPT", init_from=str(first.output_dir), optimizer__lr_peak=1e-30, optimizer__lr_min=0.0)
    second = run(config, dataset=colours)
    start = InfiMMHD.from_pretrained(first.output_dir / "model")
    start.set_window_size(56)
    end = InfiMMHD.from_pretrained(second.output_dir / "model")
    assert end.config.vision_config.window_size == 56 and end.vision.position_table.shape[0] == 65
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(end.state_dict()[name], tensor, rtol=0, atol=1e-20, msg=name)
    assert AutoTokenizer.from_pretrained(second.output_dir / "model").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(
        ValueError, match=f"init_from must be the output folder of a finished stage.*{tmp_path}/gone"
    ):
        config = tiny("CPT", init_from=str(tmp_path / "gone"), output_dir=tmp_path / "new")
        run(config, dataset=colours, tokenizer=tokenizer)


def test_a_second_run_into_the_same_folder_replaces_the_first(tiny, colours, tokenizer):
    for seed in (1, 2):
        config = tiny("PT", seed=seed, checkpoint__resume=False)
        model = tiny_model(seed)
        result = run(config, dataset=colours, tokenizer=tokenizer, model=model)
    assert_weights_close(weights_of(result.output_dir), model.state_dict())
    assert sorted(path.name for path in result.output_dir.iterdir()) == [
        "checkpoints",
        "config.json",
        "deepspeed.json",
        "finished.json",
        "log.jsonl",
        "model",
        "skipped.jsonl",
        "tensorboard",
    ]


def test_one_rank_copies_no_gradients_to_sum_them(tiny, colours, tokenizer, monkeypatch):
    """At ZeRO 0 DeepSpeed put every gradient into a bucket and back, a tenth of a step on a CPU."""
    monkeypatch.setattr(DeepSpeedEngine, "allreduce_gradients", lambda *_, **__: pytest.fail("a sum of one"))
    assert len(run(tiny("CPT", parallel__zero_stage=0), dataset=colours, tokenizer=tokenizer).losses) > 1


def test_learning_happens(tiny, colours, tokenizer):
    config = tiny("CPT", trainable=ALL_PARTS, schedule__steps=60, parallel__global_batch_size=16)
    result = run(config, dataset=colours, tokenizer=tokenizer)
    assert result.losses[-1] < 0.3 * result.losses[0]


def test_batches_without_any_image(tiny, colours, tokenizer):
    class TextOnly:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Sample:
            turns = [(question.replace("<image>", ""), answer) for question, answer in colours[index].turns]
            return Sample([], turns)

    config = tiny("CPT", trainable=ALL_PARTS, parallel__gradient_accumulation_steps=2)
    losses, weights = plain_pytorch(config, TextOnly(), tokenizer)
    result = run(config, dataset=TextOnly(), tokenizer=tokenizer, model=tiny_model())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert_weights_close(weights_of(result.output_dir), weights)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny, colours, tokenizer, zero_stage):
    model = tiny_model()
    with torch.no_grad():
        model.language.lm_head.weight[:] = float("nan")
    config = tiny("PT", parallel__zero_stage=zero_stage, guard__max_skipped_steps=0)
    message = r"max_skipped_steps 0, got 1 \(nonfinite 1\); .* loss nan and .* at step 1 of PT"
    with pytest.raises(FloatingPointError, match=message):
        run(config, dataset=colours, tokenizer=tokenizer, model=model)
    assert all(p.isfinite().all() for name, p in model.named_parameters() if "lm_head" not in name)


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]
)
def test_a_gradient_that_is_not_finite_stops(tiny, colours, tokenizer, zero_stage, precision):
    model = tiny_model()
    model.gated_blocks["1"].ffn_gate.register_hook(lambda gradient: gradient * float("inf"))
    options = {"parallel__precision": precision, "guard__max_skipped_steps": 0}
    config = tiny("PT", parallel__zero_stage=zero_stage, **options)
    message = r"got 1 \(nonfinite 1\); .* gradient norm (inf|nan) at step 1 of PT"
    with pytest.raises(FloatingPointError, match=message):
        run(config, dataset=colours, tokenizer=tokenizer, model=model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__preset": "tony"}, "model.preset must be one of infimm_hd_13b, infimm_hd_7b, "),
        ({"model__options": {"vision_config": {"num_layer": 3}}}, "did you mean 'num_layers'"),
        ({"model__options__vision_config__num_heads": 5}, "model.options must fit preset 'tiny', got {"),
        (
            {"model__options": {"vision_config": 3}},
            "must fit preset 'tiny', got {'vision_config': 3}: vision_config must be an object, got 3",
        ),
        (
            {"data__sequence_length": 513},
            "data.sequence_length must be at most the LLM's max_position_embeddings 512, got 513",
        ),
        ({"image__window_size": 30}, "window_size must be a positive multiple of patch_size 7, got 30"),
        ({"data__name": "painting"}, "did you mean 'painted'"),
        (
            {"data__tokenizer": "nowhere"},
            "data.tokenizer must be a folder with a saved tokenizer, got 'nowhere'",
        ),
        (
            {"parallel__gradient_accumulation_steps": 3},
            "parallel.global_batch_size must be a multiple of 1 ranks x 3 gradient_accumulation_steps, got 8",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(tiny, conversations, tokenizer, tmp_path, overrides, message):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"data__path": str(conversations(2)), "data__tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ValueError) as error:
        run(tiny("CPT", **(given | overrides)))
    assert message in str(error.value)
    assert not (tmp_path / "cpt").exists()


def test_tokenizer_must_fit_the_model(tiny, colours, tokenizer):
    with pytest.raises(ValueError, match="tokenizer must have at most the model's 16 tokens, got 17"):
        run(tiny("CPT", model__options__text_config__vocab_size=16), dataset=colours, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="data.tokenizer must be a folder .*, got None and no init_from"):
        run(tiny("CPT"), dataset=colours)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_reads_its_checkpoint_back(tiny, colours, tokenizer, zero_stage):
    """DeepSpeed's own reader puts the partitions together to the weights of model/ that learned."""
    result = run(tiny("CPT", parallel__zero_stage=zero_stage), dataset=colours, tokenizer=tokenizer)
    folder = result.output_dir / "checkpoints" / "step-00000003"
    weights = get_fp32_state_dict_from_zero_checkpoint(
        str(folder), tag="state", exclude_frozen_parameters=True
    )
    trained = {
        name: tensor
        for name, tensor in weights_of(result.output_dir).items()
        if not name.startswith("language.")
    }
    assert weights.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(weights[name].to(tensor.dtype), tensor), name
