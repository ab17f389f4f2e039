"""Training of InfiMM-HD: the paper's four stages on DeepSpeed; `python -m train --help` shows how.

`train.engine.run(config)` is the importable entry; recipes and configs import neither torch nor DeepSpeed."""
