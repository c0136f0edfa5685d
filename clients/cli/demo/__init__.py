"""`make demo`: the main job on real input, step by step, with timings."""
