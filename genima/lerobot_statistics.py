"""What a LeRobot dataset keeps of every feature: its mean, spread, range and quantiles."""

from __future__ import annotations

import numpy as np

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def statistics_of(values: np.ndarray) -> dict[str, list]:
    """What LeRobot keeps of a feature (T, N): {"min": N numbers, ..., "count": [T]}."""
    values = values.astype(np.float64)
    found = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
    }
    for share, quantile in zip(QUANTILES, np.quantile(values, QUANTILES, axis=0)):
        found[f"q{round(100 * share):02d}"] = quantile
    statistics = {name: value.tolist() for name, value in found.items()}
    statistics["count"] = [len(values)]
    return statistics


def image_statistics(pictures: np.ndarray) -> dict[str, list]:
    """The same of pictures (T, H, W, 3) uint8: three numbers each, 0..1, of shape (3, 1, 1)."""
    statistics = statistics_of(pictures.reshape(-1, 3) / 255)
    for name, value in statistics.items():
        statistics[name] = [[[number]] for number in value]
    statistics["count"] = [len(pictures)]
    return statistics


def merge_statistics(parts: list[dict[str, list]]) -> dict[str, list]:
    """The statistics of several episodes together. Quantiles are averaged, as LeRobot does."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    shares = counts / counts.sum()

    def average(values: np.ndarray) -> np.ndarray:
        return np.einsum("p,p...->...", shares, values)

    arrays = {name: np.array([part[name] for part in parts]) for name in parts[0]}
    mean = average(arrays["mean"])
    variance = average(arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)
    merged = {name: average(values) for name, values in arrays.items() if name.startswith("q")}
    merged["min"] = arrays["min"].min(axis=0)
    merged["max"] = arrays["max"].max(axis=0)
    merged["mean"] = mean
    merged["std"] = np.sqrt(variance)
    statistics = {name: value.tolist() for name, value in merged.items()}
    statistics["count"] = [int(counts.sum())]
    return statistics
