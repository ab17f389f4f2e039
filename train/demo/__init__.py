"""The demonstration, `python -m train.demo`: a small InfiMM-HD learns to read words on real photographs."""
