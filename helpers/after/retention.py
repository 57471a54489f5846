"""What was forgotten: a bundled panel of texts and questions unlike DPO pairs, asked before and after a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from helpers.after.checks import passes
from helpers.after.inspection import AnyRun, OpenRun, open_run, token_logps
from helpers.common import UserError, html_table, visible, why_not_written, write_json
from helpers.data.render import encode, prompt_ids
from helpers.model import Model, Tokenizer
from helpers.model.generate import Reply, generate_replies
from helpers.model.load import load_tokenizer
from helpers.run.metrics import seed_interval
from helpers.run.retained import LOST, RETAINED_FILE, Parts, lost_parts, retained_line

PANEL = Path(__file__).with_name("bundled") / "panel.jsonl"
NEW_TOKENS = {"instructions": 32, "arithmetic": 10, "facts": 10}  # where a reply is cut
AT_A_TIME = 64  # prompts, which are short


@dataclass(frozen=True, repr=False)
class Retention:
    """What `retention` found. It prints as text, and as a table in a notebook.

    `items` has a row for each item: part, id, kind, before and after (nats; or 1 for right, 0 for wrong), and the
    replies of reference and policy, safe to show. `parts` are the figures by part, as retention.json keeps them.
    """

    items: pd.DataFrame
    parts: Parts

    lost = property(lambda self: lost_parts(self.parts), doc="Names of the parts that were lost.")
    line = property(lambda self: retained_line(self.parts), doc="The verdict in one sentence.")

    @property
    def table(self) -> pd.DataFrame:
        """A row for each part: items, means before and after, change, low and high (95 percent), lost."""
        return pd.DataFrame(self.parts).T.assign(lost=[name in self.lost for name in self.parts])

    def __repr__(self) -> str:
        return f"{self.table.round(3).to_string()}\n\n{self.line}"

    def _repr_html_(self) -> str:
        return f"{html_table(self.table)}<p>{self.line}</p>"


def _asked_before(opened: OpenRun) -> Tokenizer:
    """A base model is asked by its own chat template: if it does not know the run's, that shows as a loss."""
    try:
        is_base = opened.ref_model is None and opened.run.reference is None
        return load_tokenizer(opened.model.config.name_or_path) if is_base else opened.tokenizer
    except UserError:  # it has no template
        return opened.tokenizer


def _ask(
    model: Model, tokenizer: Tokenizer, template: dict, own: Sequence[Reply] = ()
) -> tuple[pd.DataFrame, Sequence[Reply]]:
    """What `model` scores on each item, and the replies whose log-probs count: `own`, or those that it gives."""
    items, rows = pd.read_json(PANEL, lines=True), []
    parts = {name: of_part.to_dict("records") for name, of_part in items.groupby("part")}
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for item, ids in zip(parts["texts"], encode(tokenizer, [item["text"] for item in parts["texts"]]), strict=True):
        rows.append(("texts", item, token_logps(model, [start], ids).mean(), ""))
    for part, limit in NEW_TOKENS.items():
        prompts = [item["prompt"] for item in parts[part]]
        options = template | {"max_new_tokens": limit, "batch_size": AT_A_TIME}
        replies = generate_replies(model, tokenizer, prompts, **options)
        for item, reply in zip(parts[part], replies, strict=True):
            rows.append((part, item, passes(item["checks"], reply.text), visible(reply.text)))
        if part == "instructions":
            own = own or replies
            ids = prompt_ids(tokenizer, prompts, **template)
            for item, prompt, reply in zip(parts[part], ids, own, strict=True):
                logps = token_logps(model, prompt, reply.ids)
                rows.append(("replies", item, logps.mean(), ""))
                rows += [("end", item, logps[-1], "")] * reply.ended
    scores = [(part, item["id"], item["kind"], float(score), reply) for part, item, score, reply in rows]
    return pd.DataFrame(scores, columns=["part", "id", "kind", "score", "reply"]), own


def _change_of(items: pd.DataFrame) -> dict[str, float]:
    change = items.after - items.before
    mean, half = float(change.mean()), seed_interval(change.tolist())
    means = {"before": float(items.before.mean()), "after": float(items.after.mean()), "change": mean}
    return {"items": len(items)} | means | {"low": mean - half, "high": mean + half}


def retention(run: AnyRun) -> Retention:
    """What training cost on texts and questions unlike the pairs: a bundled panel, before (reference) and after.

    Its parts, of which each item is compared with itself: log-prob per token of short texts (a recipe, a log, code ...)
    in nats; instructions whose replies a program checks, arithmetic, and facts, as shares of right greedy replies;
    log-prob per token of the reference's own replies to the instructions, and that of the token that ends them. The
    interval of a change is Student's t over items; retained.yaml has the limits of what counts as lost. The figures are
    kept in the run's folder (retention.json): `verdict` then has their sentence, as have the cards of `export_run`.
    `run` is a run, its folder, or what `open_run` gave, whose UserErrors it raises.
    """
    opened = open_run(run)
    template = opened.run.info.template
    with opened.reference() as model:
        before, own = _ask(model, _asked_before(opened), template)
    after, _ = _ask(opened.model, opened.tokenizer, template, own)
    items = before.rename(columns={"score": "before", "reply": "reference"})
    items = items.assign(after=after.score, policy=after.reply)
    parts = {name: _change_of(of_part) for name in LOST if len(of_part := items[items.part == name])}
    try:
        write_json(opened.run.folder / RETAINED_FILE, {"parts": parts})
    except OSError as error:
        print(f"This could not be kept in {opened.run.folder.name} ({why_not_written(error)}), so no card has it.")
    return Retention(items, parts)
