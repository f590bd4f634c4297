"""Predictions as tests of the tables have them."""

import pandas as pd

NAMES = ["cat", "dog", "eel"]


def frame(labels, answers, probability=0.9):
    return pd.DataFrame(
        {
            "file": [f"{i}.png" for i in range(len(labels))],
            "label": labels,
            "prediction": answers,
            "probability": probability,
            "correct": [label == answer for label, answer in zip(labels, answers, strict=True)],
        }
    )
