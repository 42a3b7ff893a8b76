"""A small example of what a sweep leaves, to see the tables without hours of training."""

import os
from pathlib import Path

import pandas as pd

from cfclip.baselines.methods import fit
from cfclip.domain import Domain
from cfclip.evaluation import ablation, metrics
from cfclip.experiments import runs, spec
from cfclip.files import slug, write_rows

TRAINING, ABLATION = "02_training", "03_ablation_directions"


def example(domain: Domain, folder: str | os.PathLike) -> Path:
    """Write runs of one training step into ``folder``, as a sweep does; their numbers mean nothing."""
    folder, strengths, n, seeds = Path(folder), [0.5, 1.0], 2, (0, 1)
    prompts = ("green lipstick", domain.source_text)
    cells = [(TRAINING, m, p, s) for m in ("cfclip", "styleclip-mapper") for p in prompts for s in seeds]
    cells += [(ABLATION, row, prompts[0], s) for row in ("CF-CLIP", "negatives: none") for s in seeds]
    for notebook, name, prompt, seed in cells:
        run = f"{notebook}-{slug(name)}-{slug(prompt)}-{seed}"
        given = {"domain": domain.name, "settings": {"steps": 1}, "n": n}
        small = {"steps": 1, "batch": 1, "train_latents": 1}
        if notebook == TRAINING:
            editor = fit(name, domain, prompt, out=folder / run, progress=False, seed=seed, **small)
            w = domain.latents(n, "test", seed)
            rows = pd.DataFrame(metrics.over_strengths(domain, prompt, editor.edit, w, strengths))
            given |= {"method": name, "prompt": prompt, "seed": seed}
        else:
            jobs = ablation.jobs([name], [prompt], [seed], small, folder / run)
            rows, _ = ablation.run(domain, jobs, n, strengths)
            given |= {"rows": [name], "prompts": [prompt], "seeds": [seed]}
        write_rows(folder / run / "metrics.jsonl", rows.to_dict("records"))
        runs.write_record(runs.Run(run, spec.find_notebook(notebook), given, {}), folder / run, "finished")
    return folder
