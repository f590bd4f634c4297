"""The classic recipes of transfer learning, each as a short script that runs today.

    python -m benchmarks.recipes.cats_dogs [--smoke] [--output DIR]
    python -m benchmarks.recipes --smoke

Each script loads its real data and weights from the network. With `--smoke` it gets small images of
the same form, and random weights, made here (`materials.py`), and takes seconds. `by_hand/` holds
what books and articles write in plain Keras; `__main__.py` runs both and puts them side by side.
"""
