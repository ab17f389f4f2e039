"""The papers' three findings in miniature: ``python -m bench.miniature``.

A set of generated pages with text of known size (`pages`), one small ViT, ConvNeXt and LLM warmed up apart
from each other (`warmup`), and from these one model for each arm and seed (`arms`, `training`), scored on
held-out pages and words (`evaluate`); table, plots and a model card are made from the results alone
(`report`, `plots`, `card`)."""
