"""Processor: the trainer's token ids from messages, marks matched to images, padding, saving, decoding."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from model.image import ImageProcessor
from model.processing import VICUNA_SYSTEM, InfiMMHDProcessor, prompt_template, register
from train.batch import RowEncoder
from train.data import Sample
from train.demo.vocabulary import build_tokenizer

END = "<|endofchunk|>"
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
SQUARE = np.zeros((8, 8, 3), np.uint8)
LINES = [
    VICUNA_SYSTEM,
    "USER: Which colour is it? ASSISTANT: Dark red.",
    "What does the sign say: 'Söft 12'?",
]


class StandInConfig(PreTrainedConfig):
    model_type = "infimm_hd_processing_test"


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(StandInConfig)
    register(StandInConfig)  # a second time changes nothing


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", END],
    )


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", END]


def word_level() -> PreTrainedTokenizerFast:
    words = sorted({word for line in LINES for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer)


def byte_level(prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return wrapped(tokenizer)


def llama_like(style: str) -> PreTrainedTokenizerFast:
    """ "first", "always": Metaspace as Llama's newer tokenizers have it; "legacy": as a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no token spans two words
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    if style == "legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


TOKENIZERS = {
    "words": word_level,
    "bytes": byte_level,
    "bytes with prefix space": lambda: byte_level(True),
    "llama first": lambda: llama_like("first"),
    "llama always": lambda: llama_like("always"),
    "llama legacy": lambda: llama_like("legacy"),
}


def processor_of(tokenizer=None, **arguments) -> InfiMMHDProcessor:
    images = ImageProcessor(window_size=8, mode="dynamic")
    return InfiMMHDProcessor(images, word_level() if tokenizer is None else tokenizer, **arguments)


def user(*parts: str | None) -> dict:
    """None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


TURNS = [
    ("Which colour is it?", "Dark red."),
    ("What does the sign say?", "Söft 12."),
    ("  Why? ", "\n- It is"),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("prompt", ["vicuna_v1", "plain"])
def test_the_template_gives_the_trainers_ids(kind, with_image, prompt):
    """Segments are tokenized apart on both sides. One tokenizer call over the whole text gives other ids
    with prepend_scheme="first" (test below)."""
    tokenizer = TOKENIZERS[kind]()
    template = prompt_template(prompt, "<image>", processor_of(tokenizer).end_of_chunk_token)
    processor = processor_of(tokenizer, chat_template=template)
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=8),
        prompt=prompt,
        sequence_length=4096,
        image_token_id=processor.image_token_id,
        end_token_id=processor.end_of_chunk_token_id,
    )
    (question, answer), *others = TURNS
    turns = [("<image>" * with_image + question, answer), *others]
    row = encoder(Sample([PICTURE] * with_image, turns))
    messages = [
        message
        for number, (question, answer) in enumerate(TURNS)
        for message in (
            user(*[None] * (with_image and number == 0), question),
            assistant(answer),
        )
    ]
    images = {"images": [PICTURE]} if with_image else {}
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=images)
    assert batch["input_ids"][0].tolist() == row.input_ids
    assert batch["images_per_sample"].tolist() == [int(with_image)]
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    begun = processor([PICTURE] if with_image else None, prompt)["input_ids"][0].tolist()
    assert row.input_ids[: len(begun)] == begun


def test_one_call_over_the_whole_text_would_differ():
    """Why pieces: behind a special token one of these puts no space, and the trainer's pieces have one."""
    text = f"USER: <image>Which? ASSISTANT: red{END}USER: Why?"
    for kind, same in (("llama first", False), ("llama always", True), ("llama legacy", True)):
        tokenizer = TOKENIZERS[kind]()
        whole = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert (processor_of(tokenizer)([SQUARE], text)["input_ids"][0].tolist() == whole) == same, kind


def test_the_text_of_a_conversation():
    processor = processor_of()
    messages = [user(None, "Which?"), assistant("Red."), {"role": "user", "content": "Why?"}]
    expected = f"{VICUNA_SYSTEM} USER: <image>Which? ASSISTANT: Red.{END}USER: Why?"
    assert processor.apply_chat_template(messages) == expected
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected + " ASSISTANT:"
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        own = [{"role": "system", "content": system}, user("a", None, "b", None)]
        assert processor.apply_chat_template(own) == "Be brief. USER: a<image>b<image>"
    assert processor.apply_chat_template([{"role": "system", "content": ""}, user("a")]) == "USER: a"
    assert processor.apply_chat_template([[user("a")], [user(None)]])[1].endswith("USER: <image>")
    quotes = processor.apply_chat_template([user("\"{{ 1 }}\" 'x' \\n <b> ")])
    assert quotes == f"{VICUNA_SYSTEM} USER: \"{{{{ 1 }}}}\" 'x' \\n <b> "


def test_images_inside_the_messages_are_read(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    for key, value in (("image", Image.fromarray(PICTURE)), ("path", str(tmp_path / "a.png"))):
        content = [{"type": "image", key: value}, {"type": "text", "text": "Which?"}]
        batch = processor_of().apply_chat_template(
            [[{"role": "user", "content": content}], [user("Why?")]],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        )
        assert torch.equal(
            batch["pixel_values"], ImageProcessor(window_size=8, mode="dynamic").process(PICTURE).pixel_values
        )
        assert batch["images_per_sample"].tolist() == [1, 0]
        assert batch["windows_per_image"].tolist() == [3]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"conversation must be a list of messages, not empty"),
        ([assistant("a")], r"conversation\[0\]\['role'\] must be 'system' or 'user', got 'assistant'"),
        ([user("a"), user("b")], r"conversation\[1\]\['role'\] must be 'assistant', got 'user'"),
        (
            [[user("a")], [{"role": "user"}]],
            r"conversation\[1\]\[0\]\['content'\] must be a string or a list",
        ),
        ([user("a <image> b")], r"conversation\[0\] text must not contain '<image>', got 'a <image> b'"),
        ([user(f"a{END}")], r"conversation\[0\] text must not contain '<\|endofchunk\|>'"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            r"\['type'\] must be 'text' or 'image' in a user",
        ),
        ([user("a"), {"role": "assistant", "content": [{"type": "image"}]}], "must be 'text' in a assistant"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\['text'\] must be a string, got None"),
    ],
)
def test_bad_messages_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        processor_of().apply_chat_template(messages)


def test_a_batch_is_the_models_arguments():
    processor = processor_of()
    batch = processor([PICTURE, SQUARE, PICTURE], ["<image>USER: <image>say", "it", "<image>"])
    names = ["input_ids", "attention_mask", "pixel_values", "window_positions", "windows_per_image"]
    assert sorted(batch) == sorted([*names, "images_per_sample"]) == sorted(processor.model_input_names)
    assert batch["images_per_sample"].tolist() == [2, 0, 1]
    assert batch["windows_per_image"].tolist() == [3, 1, 3]
    assert batch["pixel_values"].shape == (7, 3, 8, 8) and batch["window_positions"].shape == (7, 2)
    image, pad, bos = processor.image_token_id, 0, 1
    ids = batch["input_ids"].tolist()
    assert ids[0][:2] == [bos, image] and ids[0][3] == image and len(ids[0]) == 5
    assert ids[1][:3] == [pad, pad, pad] and ids[1][3] == bos and ids[2] == [pad, pad, pad, bos, image]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    right = processor(None, ["it say", "it"], padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["input_ids"][1, 2] == pad
    assert all(right[name].dtype == torch.int64 for name in right)
    assert "pixel_values" not in right and "window_positions" not in right
    assert right["images_per_sample"].tolist() == [0, 0] and right["windows_per_image"].tolist() == []
    bare = processor(text="<s> it", add_special_tokens=False)["input_ids"].tolist()
    assert (
        bare == processor(text="it")["input_ids"].tolist() == processor(text="<s> it")["input_ids"].tolist()
    )
    assert len(processor(text="it", add_special_tokens=False)["input_ids"][0]) == 1


def test_images_come_alone_flat_or_per_text():
    processor = processor_of()
    texts = ["<image><image>", "<image>"]
    flat = processor([PICTURE, SQUARE, SQUARE], texts)
    nested = processor([[PICTURE, SQUARE], [SQUARE]], texts)
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    alone = processor(SQUARE, "<image>")
    assert alone["images_per_sample"].tolist() == [1] and len(alone["pixel_values"]) == 1


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (None, ["it", "<image>"], "images must be as many as the 1 '<image>' in sample 1, got 0"),
        ([SQUARE], ["<image>", "<image><image>"], "as many as the 2 '<image>' in sample 1, got 0"),
        ([SQUARE] * 3, ["<image>", "<image>"], "as many as the 1 '<image>' in sample 1, got 2"),
        ([[SQUARE], []], ["it", "<image>"], "as many as the 0 '<image>' in sample 0, got 1"),
        ([[SQUARE]], ["<image>", "it"], "images must be one list for each of the 2 texts, got '1 entries'"),
        ([[SQUARE], SQUARE], ["<image>"] * 2, "images must be one list for each of the 2 texts"),
        (None, [], "text must be a string or a list of strings, not empty"),
        (None, None, "text must be a string or a list of strings, not empty, got None"),
        ("absent.png", "<image>", "image must be an existing file, got 'absent.png'"),
    ],
)
def test_marks_and_images_have_to_match(images, texts, message):
    with pytest.raises(ValueError, match=message):
        processor_of()(images, texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(padding="max_length"), "padding must be True, 'longest' or False, got 'max_length'"),
        (dict(padding=False), r"padding must be True where texts differ in length, got 'lengths \[2, 3\]'"),
        (dict(padding_side="top"), "padding_side must be 'left' or 'right', got 'top'"),
        (dict(return_tensors="np"), "return_tensors must be 'pt', got 'np'"),
        (dict(videos=[1]), "videos and audio must be None"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor_of()(text=["it", "it say"], **arguments)


def test_a_mark_becomes_as_many_tokens_as_the_windows_need():
    processor = processor_of(image_seq_length=4)
    batch = processor([PICTURE, SQUARE], ["it <image> say <image>"])
    ids = batch["input_ids"][0]
    runs = "".join("i" if token == processor.image_token_id else "t" for token in ids.tolist())
    assert runs == "tt" + "i" * 12 + "t" + "i" * 4


@pytest.mark.parametrize("auto", [False, True])
def test_saved_and_loaded(tmp_path, auto):
    processor = processor_of(byte_level(), image_seq_length=4, chat_template=None)
    processor.save_pretrained(tmp_path)
    loaded = (AutoProcessor if auto else InfiMMHDProcessor).from_pretrained(tmp_path)
    assert type(loaded) is InfiMMHDProcessor and type(loaded.image_processor) is ImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    conversation = dict(conversation=[user(None, "Söft?")], tokenize=True, add_generation_prompt=True)
    options = dict(return_dict=True, processor_kwargs={"images": [PICTURE]})
    before, after = (p.apply_chat_template(**conversation, **options) for p in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    if auto:
        try:
            image_processor = AutoImageProcessor.from_pretrained(tmp_path)
        except ImportError:  # transformers 5.17 without torchvision
            return
        assert image_processor.to_dict() == processor.image_processor.to_dict()
    other = InfiMMHDProcessor.from_pretrained(tmp_path, image_seq_length=2, window_size=4)
    assert (other.image_seq_length, other.image_processor.window_size) == (2, 4)


def test_own_tokens_and_the_demos_tokenizer():
    processor = processor_of(build_tokenizer())
    assert (processor.image_token_id, processor.end_of_chunk_token_id) == (2, 3)
    tokenizer = word_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[img]", "[end]"]})
    processor = processor_of(tokenizer, image_token="[img]", end_of_chunk_token="[end]")
    text = processor.apply_chat_template([user(None, "it"), assistant("say")])
    assert text.endswith("USER: [img]it ASSISTANT: say[end]")
    ids = processor(SQUARE, text)["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 1 and ids[-1] == processor.end_of_chunk_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(image_token="<picture>"),
            "image_token must be a token that the tokenizer knows, got '<picture>'",
        ),
        (dict(end_of_chunk_token="<eoc>"), "end_of_chunk_token must be a token that the tokenizer knows"),
        (dict(image_token=7), "image_token must be a token that the tokenizer knows, got 7"),
        (dict(image_token=END), "image_token must differ from end_of_chunk_token"),
        (dict(image_seq_length=0), "image_seq_length must be a positive int, got 0"),
        (dict(image_processor=None), "image_processor must be a model.ImageProcessor, got 'NoneType'"),
        (dict(tokenizer="x"), "tokenizer must be a tokenizer of transformers, got 'str'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    defaults = dict(image_processor=ImageProcessor(window_size=8), tokenizer=word_level())
    with pytest.raises(ValueError, match=message):
        InfiMMHDProcessor(**{**defaults, **arguments})


def test_decoding_ends_at_the_end_and_drops_padding():
    processor = processor_of(byte_level())
    tokenizer, end, pad = processor.tokenizer, processor.end_of_chunk_token_id, 0
    answer = tokenizer(" Söft 12.", add_special_tokens=False)["input_ids"]
    rows = [[pad, pad, *answer, end, *answer], [*answer, pad, pad]]
    assert processor.batch_decode(rows) == ["Söft 12."] * 2
    assert processor.decode(torch.tensor(rows[0])) == "Söft 12."
    assert processor.decode([end]) == processor.decode([pad]) == processor.decode([]) == ""
