"""A checkpoint of any known form, seen from our side: our names, our shapes, tensors read when asked for."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..checks import require, require_choice
from ..config import InfiMMHDConfig
from ..infimm_hd import InfiMMHD
from ..vision import VisionTransformer
from ..vision_config import VisionConfig
from .files import FLOATING, Source, shown
from .forms import FORMS, INFIMM_STAGE1, OWN, Form, reason_for
from .links import Link, Shapes, make_links, our_shapes, template_pattern, their_shapes
from .report import ConversionError, Report
from .sizes import stage1_config, text_config, vision_config

Tensors = dict[str, Callable[[], Tensor]]
"""Our names in our order, and what reads each tensor."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel, DeepSpeed and torch.compile put before every name."""
_EMBEDDING, _HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"
PARTS = ("vision", "gated", "language")


def part_of(name: str) -> str:
    """The part that our tensor `name` belongs to; "gated" is all that joins the other two."""
    root = name.partition(".")[0]
    return root if root in PARTS else "gated"


class Checkpoint:
    """The weights in `path`, checked whole when it is opened: names and shapes, dtypes, second names.

    `form`: a name of `model.convert.forms.FORMS`, or "auto". `wanted`: a preset's configuration that the
    weights have to fit. A context manager. ValueError names the file and the tensor at fault."""

    def __init__(self, path: str | Path, form: str = "auto", wanted: InfiMMHDConfig | None = None) -> None:
        require_choice("--from", form, ("auto", *FORMS))
        self.source = Source(path)
        self.config: InfiMMHDConfig | None = None
        self.vision_config: VisionConfig | None = None
        self.text_config: PreTrainedConfig | None = None
        try:
            self.form, self._names, beside = _recognised(self.source, form)
            self.report = Report(str(path), self.form.name)
            self._leave_out(beside)
            self._links = self._check(wanted)
        except BaseException:
            self.source.__exit__()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.__exit__()

    @property
    def folder(self) -> Path:
        return self.source.folder

    def tensors(self, parts: Sequence[str] = PARTS, reason: str = "") -> Tensors:
        """Those of some parts (of `PARTS`); the others are reported as left out for `reason`."""
        tensors: Tensors = {}
        for link in self._links:
            if part_of(link.ours[0]) in parts:
                tensors |= {name: partial(self._read, link, index) for index, name in enumerate(link.ours)}
            else:
                originals = [original for name in link.theirs for original in self._names[name]]
                self.report.left_out |= dict.fromkeys(originals, reason)
        for names in (self.report.used, self.report.aliases):
            names[:] = [name for name in names if name not in self.report.left_out]
        return tensors

    def dtypes(self) -> set[str]:
        """Of the tensors that are used, in safetensors' words."""
        return {self.source.dtype(name) for name in self.report.used}

    def num_values(self, part: str) -> int:
        """Numbers in the tensors of a part."""
        names = [name for link in self._links if part_of(link.ours[0]) == part for name in link.theirs]
        return sum(torch.Size(self._shape(name)).numel() for name in names)

    def _read(self, link: Link, index: int) -> Tensor:
        return link.to_ours([self._tensor(name) for name in link.theirs])[index]

    def _tensor(self, name: str) -> Tensor:
        first, *others = self._names[name]
        tensor = self.source.tensor(first)
        for other in others:
            self._require_equal(tensor, first, other)
        return tensor

    def _require_equal(self, tensor: Tensor, first: str, other: str) -> None:
        second = self.source.tensor(other)
        same = tensor.dtype == second.dtype and torch.equal(tensor, second)
        rule = f"equal {self.source.where(first)}, of which it is a second name"
        require(same, self.source.where(other), rule, "other values")

    def _shape(self, name: str) -> list[int]:
        return self.source.shape(self._names[name][0])

    def _leave_out(self, beside: dict[str, str]) -> None:
        """Takes the names out that the form lists as having no place with us."""
        self.report.left_out |= dict.fromkeys(self.source.beside, "no weights: a training program's state")
        for name, original in beside.items():
            reason = reason_for(name, self.form.left_out_beside)
            if reason is None:
                self.report.unexpected.append(original)
            else:
                self.report.left_out[original] = reason
        for name, originals in list(self._names.items()):
            reason = reason_for(name, self.form.left_out)
            if reason is None and reason_for(name, dict.fromkeys(self.form.zero, "zero")):
                for original in originals:
                    zero = not self.source.tensor(original).any()
                    require(zero, self.source.where(original), "be zero", "other values")
                reason = "zero: the model has no bias on keys"
            if reason is not None:
                self.report.left_out |= dict.fromkeys(self._names.pop(name), reason)

    def _check(self, wanted: InfiMMHDConfig | None) -> list[Link]:
        links, _ = make_links(self.form.rules, self._names, "theirs")
        shapes = our_shapes(links, {name: self._shape(name) for name in self._names})
        model = self._configured_model(shapes, wanted)
        expected = expected_shapes(model)
        links = links_of(self.form, expected, self.config)
        self._merge_tied_head(expected)
        used = [name for link in links for name in link.theirs]
        self.report.missing = [name for name in used if name not in self._names]
        places = set(used)
        for name, originals in self._names.items():
            if name not in places:
                self.report.unexpected += originals
        self._refuse_other_names()
        for link in links:
            self._check_shapes(link, expected)
        for name in used:
            first, *others = self._names[name]
            self.report.used.append(first)
            self.report.aliases += others
        return links

    def _configured_model(self, shapes: Shapes, wanted: InfiMMHDConfig | None) -> nn.Module:
        """Sets the configurations; a model without storage that has all the names."""
        folder = self.source.folder
        if self.form is OWN:
            self.config = InfiMMHDConfig.load(folder / "config.json")
        elif self.form is INFIMM_STAGE1:
            self.config = stage1_config(folder, shapes, wanted)
        elif "vision" in self.form.parts:
            self.vision_config = vision_config(self.form, folder, shapes, wanted and wanted.vision_config)
        else:
            self.text_config = text_config(folder, shapes)
        with torch.device("meta"):
            if self.config is not None:
                return InfiMMHD(self.config)
            if self.vision_config is not None:
                return nn.ModuleDict({"vision": VisionTransformer(self.vision_config)})
            return nn.ModuleDict(
                {"language": AutoModelForCausalLM.from_config(copy.deepcopy(self.text_config))}
            )

    def _merge_tied_head(self, expected: Shapes) -> None:
        """Where the config ties the output to the embeddings, a stored output is a second name of them."""
        if _EMBEDDING not in expected or _HEAD in expected:
            return
        (head,), _ = make_links(self.form.rules, [_HEAD], "ours")
        (embedding,), _ = make_links(self.form.rules, [_EMBEDDING], "ours")
        if head.theirs[0] in self._names and embedding.theirs[0] in self._names:
            self._names[embedding.theirs[0]] += self._names.pop(head.theirs[0])

    def _refuse_other_names(self) -> None:
        missing, unexpected = self.report.missing, self.report.unexpected
        if not missing and not unexpected:
            return
        found = [f"{len(missing)} missing: {shown(missing)}"] if missing else []
        if unexpected:
            files = sorted({str(self.source.file_of(name)) for name in unexpected})
            found.append(f"{len(unexpected)} unexpected: {shown(unexpected)} in {shown(files)}")
        rule = f"SRC must hold exactly the tensors of {self.form.name} weights"
        raise ConversionError(f"{rule}, got {str(self.source.path)!r} with {'; '.join(found)}", self.report)

    def _check_shapes(self, link: Link, expected: Shapes) -> None:
        for name, shape in their_shapes(link, expected).items():
            for original in self._names[name]:
                where, found = self.source.where(original), self.source.shape(original)
                require(found == shape, where, f"have shape {shape}", found)
                dtype = self.source.dtype(original)
                require(dtype in FLOATING, where, "be floating weights of 16, 32 or 64 bits", dtype)


def links_of(form: Form, names: Iterable[str], config: InfiMMHDConfig | None) -> list[Link]:
    """The links of our `names` to a form; ValueError for names that have no place in it."""
    links, homeless = make_links(form.rules, names, "ours", () if config is None else config.gated_layers)
    require(
        not homeless, "model", f"have only tensors that {form.name} weights have a place for", shown(homeless)
    )
    return links


def expected_shapes(model: nn.Module) -> Shapes:
    """Of a model's weights, tied ones once."""
    shapes: Shapes = {}
    seen: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in seen:
            seen.add(id(weight))
            shapes[name] = list(weight.shape)
    return shapes


def _recognised(source: Source, wanted: str) -> tuple[Form, dict[str, list[str]], dict[str, str]]:
    """The form, the original names by the form's own name, and the names that do not stand behind its prefix,
    with the original of each."""
    names, wrapper = source.names, ""
    for before in _WRAPPERS:
        if names and all(name.startswith(wrapper + before) for name in names):
            wrapper += before
    bare = {name.removeprefix(wrapper): name for name in names}
    forms = FORMS.values() if wanted == "auto" else [FORMS[wanted]]
    for form in forms:
        prefix = form.prefix_in(bare)
        if prefix is None:
            continue
        by_name: dict[str, list[str]] = {}
        beside = {}
        for name, original in bare.items():
            if name.startswith(prefix):
                by_name.setdefault(_known_name(form, name.removeprefix(prefix)), []).append(original)
            else:
                beside[name] = original
        return form, by_name, beside
    signatures = [f"{form.name} ({form.prefixes[0]}{form.signature})" for form in forms]
    raise ValueError(
        f"SRC must hold weights of a known form, one of {', '.join(signatures)}, "
        f"got {str(source.path)!r} with {shown(names) or 'no tensor'}"
    )


def _known_name(form: Form, name: str) -> str:
    for other, known in form.aliases:
        if found := template_pattern(other).fullmatch(name):
            return known.format(**found.groupdict())
    return name
