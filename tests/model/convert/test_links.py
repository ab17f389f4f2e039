"""The engine on rules of the test's own, and what every form's rules have to keep."""

import pytest
import torch

from model import InfiMMHD, InfiMMHDConfig, preset
from model.convert.checkpoint import expected_shapes, links_of
from model.convert.forms import FORMS, INFIMM_STAGE1, TRANSFORMERS_LLAMA
from model.convert.links import DIVIDED, JOINED, KEYS_VALUES, PATCH_KERNEL, Rule, leading_ones, make_links
from tests.model.convert.conftest import clip_config, stage1_model_config

CASES = [
    (PATCH_KERNEL, [torch.randn(4, 3, 7, 7)], [(4, 147)]),
    (leading_ones(2), [torch.randn(1, 1, 5)], [(5,)]),
    (JOINED, [torch.randn(4, 2) for _ in range(3)], [(12, 2)]),
    (DIVIDED, [torch.randn(12)], [(4,)] * 3),
    (KEYS_VALUES, [torch.randn(8, 3) for _ in range(5)], [(5, 2, 4, 3)]),
]


@pytest.mark.parametrize(("transform", "theirs", "shapes"), CASES)
def test_transforms_go_there_and_back(transform, theirs, shapes):
    ours = transform.to_ours(theirs, len(shapes))
    assert [tuple(tensor.shape) for tensor in ours] == shapes
    back = transform.to_theirs(ours, len(theirs))
    assert all(torch.equal(one, other) for one, other in zip(back, theirs, strict=True))


def test_keys_stand_before_values_and_colours_before_rows():
    key, value = torch.zeros(4, 3), torch.ones(4, 3)
    (stack,) = KEYS_VALUES.to_ours([torch.cat([key, value])], 1)
    assert torch.equal(stack[0, 0], key) and torch.equal(stack[0, 1], value)
    kernel, patch = torch.randn(4, 3, 7, 7), torch.randn(1, 3, 7, 7)
    (weight,) = PATCH_KERNEL.to_ours([kernel], 1)
    expected = torch.nn.functional.conv2d(patch, kernel).flatten()
    torch.testing.assert_close(weight @ patch.flatten(), expected)


def test_rules_match_numbers_and_collect_every_block():
    rules = [Rule("kv", "x.{every_gated}.kv", KEYS_VALUES), Rule("a.{block}.{rest}", "b.{block}.z.{rest}")]
    names = ["x.10.kv", "x.2.kv", "b.11.z.w.bias", "b.q.z.w", "c"]
    links, unmatched = make_links(rules, names, "theirs")
    assert [(link.ours, link.theirs) for link in links] == [
        (("kv",), ("x.2.kv", "x.10.kv")),
        (("a.11.w.bias",), ("b.11.z.w.bias",)),
    ]
    assert unmatched == ["b.q.z.w", "c"]
    links, unmatched = make_links(rules, ["a.3.w", "kv", "d"], "ours", (2, 10))
    assert [link.theirs for link in links] == [("b.3.z.w",), ("x.2.kv", "x.10.kv")] and unmatched == ["d"]


def configs_of(form) -> InfiMMHDConfig:
    if form is INFIMM_STAGE1:
        return stage1_model_config()
    config = preset("tiny")
    if "clip" in form.name and form.name not in ("eva-clip", "open-clip-timm"):
        config.vision_config = clip_config()
    return InfiMMHDConfig.from_dict(config.to_dict())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_forms_rules_have_one_place_for_each_tensor_of_its_parts(form):
    config = configs_of(form)
    with torch.device("meta"):
        names = list(expected_shapes(InfiMMHD(config)))
    parts = {name: name.partition(".")[0] for name in names}
    kept = [
        name
        for name in names
        if (parts[name] if parts[name] in ("vision", "language") else "gated") in form.parts
    ]
    links = links_of(form, kept, config)
    theirs = [name for link in links for name in link.theirs]
    assert sorted(name for link in links for name in link.ours) == sorted(kept)
    assert len(theirs) == len(set(theirs))
    assert form is TRANSFORMERS_LLAMA or form.signature in theirs
