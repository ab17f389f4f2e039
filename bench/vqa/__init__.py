"""Questions about images: answers of a model, and the scores of the paper's Table 9 from them.

`python -m bench.vqa --list` names the sets. The metrics (`metrics*.py`) need neither torch nor
transformers."""
