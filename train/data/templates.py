"""Manifests of the paper's stages, to be filled with the files at hand: names, forms, prompts, weights."""

from typing import Any

CAPTION_QUESTION = "Describe the image in one sentence."


def _vqa(name: str, form: str, path: str, images: str, weight: int, **more: Any) -> dict[str, Any]:
    options = {"form": form} | more.pop("options", {})
    entry = dict(name=name, reader="vqa", path=path, image_root=images, options=options)
    return entry | dict(prompt="vicuna_v1", weight=weight) | more


def _captions(name: str, form: str, path: str, images: str, weight: int) -> dict[str, Any]:
    options = {"form": form, "question": CAPTION_QUESTION}
    entry = dict(name=name, reader="captions", path=path, image_root=images, options=options)
    return entry | dict(prompt="vicuna_v1", weight=weight)


def table1() -> dict[str, Any]:
    """CPT and DRA: the sets of Table 1, weighted by their numbers of samples there.

    The text-oriented augmentation is a set of its own over GQA's files with the 100,000 pairs that the paper
    names; Table 1 does not say whether GQA's 471,000 hold them, and here they do."""
    gqa = ("gqa/train_balanced_questions.json", "gqa/images")
    vqav2 = {"annotations": "vqav2/v2_mscoco_train2014_annotations.json"}
    textvqa = "textvqa/train_images"
    okvqa = {"annotations": "okvqa/mscoco_train2014_annotations.json"}
    return {
        "sets": [
            _captions("coco_caption", "coco", "coco/captions_train2014.json", "coco/train2014", 205_000),
            _captions("textcaps", "textcaps", "textcaps/TextCaps_0.1_train.json", textvqa, 55_000),
            _captions("vizwiz_caption", "coco", "vizwiz/captions_train.json", "vizwiz/train", 55_000),
            _vqa(
                "vqav2",
                "vqav2",
                "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
                "coco/train2014",
                443_000,
                options=vqav2,
            ),
            _vqa(
                "okvqa",
                "okvqa",
                "okvqa/OpenEnded_mscoco_train2014_questions.json",
                "coco/train2014",
                9_000,
                options=okvqa,
            ),
            _vqa("vizwiz_vqa", "vizwiz", "vizwiz/train.json", "vizwiz/train", 20_000),
            _vqa("gqa", "gqa", *gqa, 371_000),
            _vqa("gqa_text", "gqa", *gqa, 100_000, augment={"seed": 0, "num_questions": 2}),
            _vqa("aokvqa", "aokvqa", "aokvqa/aokvqa_v1p0_train.json", "coco/train2017", 17_000),
            _vqa("textvqa", "textvqa", "textvqa/TextVQA_0.5.1_train.json", textvqa, 34_000),
            _vqa("ocrvqa", "ocrvqa", "ocrvqa/dataset.json", "ocrvqa/images", 166_000),
            _vqa("stvqa", "stvqa", "stvqa/train_task_3.json", "stvqa", 26_000),
            _vqa("docvqa", "docvqa", "docvqa/train_v1.0.json", "docvqa", 63_000),
            dict(
                name="llavar",
                reader="conversations",
                path="llavar/llava_instruct_150k_llavar_16k.json",
                image_root="llavar/images",
                prompt="vicuna_v1",
                weight=16_000,
            ),
            dict(
                name="vg_regions",
                reader="regions",
                path="vg/region_descriptions.json",
                image_root="vg",
                prompt="vicuna_v1",
                weight=429_000,
            ),
        ]
    }


def pretraining() -> dict[str, Any]:
    """PT: pairs and interleaved documents, weighted as the paper's batches hold them (10,240 pairs and 768
    documents, half of them of each set)."""
    shards = ["laion2b/{00000..00999}.tar", "coyo/{00000..00999}.tar", "laion_coco/{00000..00999}.tar"]
    return {
        "sets": [
            dict(name="pairs", reader="webdataset", path=shards, prompt="plain", weight=10_240),
            dict(
                name="mmc4",
                reader="mmc4",
                path="mmc4/documents.jsonl",
                image_root="mmc4/images",
                options={"min_similarity": 0.24, "max_images": 5},
                prompt="plain",
                weight=384,
            ),
            dict(
                name="obelics",
                reader="obelics",
                path="obelics/documents.jsonl",
                image_root="obelics/images",
                options={"max_images": 5},
                prompt="plain",
                weight=384,
            ),
        ]
    }


def instruction_tuning() -> dict[str, Any]:
    """IFT: LLaVA's 665 thousand conversations, LLaVAR, TextVQA and ScienceQA, by their numbers of samples."""
    conversations = {
        "llava_665k": ("llava/llava_v1_5_mix665k.json", "llava/images"),
        "llavar": ("llavar/llava_instruct_150k_llavar_16k.json", "llavar/images"),
        "scienceqa": ("scienceqa/llava_train_QCM-LEPA.json", "scienceqa/images"),
    }
    sets = [
        dict(name=name, reader="conversations", path=path, image_root=images, prompt="vicuna_v1")
        for name, (path, images) in conversations.items()
    ]
    textvqa = _vqa("textvqa", "textvqa", "textvqa/TextVQA_0.5.1_train.json", "textvqa/train_images", 0)
    del textvqa["weight"]
    return {"sets": [*sets, textvqa]}


TEMPLATES = {"pt": pretraining, "table1": table1, "ift": instruction_tuning}
