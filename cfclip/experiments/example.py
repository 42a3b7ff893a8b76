"""An example of a sweep, for a look at the tables without hours of training."""

import os
from pathlib import Path

import pandas as pd

from cfclip.baselines.methods import fit
from cfclip.domain import Domain
from cfclip.evaluation import ablation, metrics
from cfclip.experiments import runs, spec
from cfclip.files import slug, write_rows


def example(domain: Domain, folder: str | os.PathLike) -> Path:
    """Runs of one step as a sweep leaves them, for a look at the tables; their numbers mean nothing."""
    folder, strengths, n = Path(folder), [0.5, 1.0], 2
    cells = [
        ("02_training", method, prompt, seed)
        for method in ("cfclip", "styleclip-mapper")
        for prompt in ("green lipstick", domain.source_text)
        for seed in (0, 1)
    ]
    cells += [
        ("03_ablation_directions", row, "green lipstick", seed)
        for row in ("CF-CLIP", "negatives: none")
        for seed in (0, 1)
    ]
    for notebook, name, prompt, seed in cells:
        run = f"{notebook}-{slug(name)}-{slug(prompt)}-{seed}"
        shared = {
            "out": folder / run,
            "progress": False,
            "seed": seed,
            "steps": 1,
            "batch": 1,
            "train_latents": 1,
        }
        if notebook == "02_training":
            editor = fit(name, domain, prompt, **shared)
            rows = pd.DataFrame(
                metrics.over_strengths(
                    domain, prompt, editor.edit, domain.latents(n, "test", seed), strengths
                )
            )
        else:
            rows = ablation.run_row(domain, name, prompt, n=n, strengths=strengths, **shared)
        write_rows(folder / run / "metrics.jsonl", rows.to_dict("records"))
        given = {"domain": domain.name, "prompt": prompt, "settings": {"steps": 1}, "n": n}
        given |= (
            {"method": name, "seed": seed}
            if notebook == "02_training"
            else {"rows": [name], "seeds": [seed], "strength": 1.0}
        )
        runs.write_record(runs.Run(run, spec.find_notebook(notebook), given, {}), folder / run, "finished")
    return folder
