"""Tables of in_model.py's rows (results/in_model/*.jsonl): logits, texts, the host's part of a call, a block. No
torch."""

import statistics

EMPTY = "No results yet: `benchmarks/in_model.py --results` appends some."
MODES = ("eager", "compiled", "graph")
IMPLEMENTATIONS = ("megamoe", "eager", "grouped_mm", "batched_mm")
ERRORS = (("kl", ".2e"), ("top1", ".2%"), ("rel_l2", ".2e"))


def markdown(rows: list[dict]) -> str:
    """Four tables for each kind of GPU, whatever their number; a cell: median of its newest commit's rows."""
    out = []
    for device in sorted({row["device"] for row in rows}):
        of_device = [row for row in rows if row["device"] == device]
        for title, table in (("Logits", _logits), ("Text of a trained model", _text),
                             ("An eager call on the host", _overhead), ("One block", _block)):  # fmt: skip
            cells = _cells([row for row in of_device if row["part"] == table.__name__[1:]])
            if text := table(cells):
                out.append(f"**{title}**, {device}\n\n{text}\n\n{_certificate(cells)}\n")
    return "\n".join(out).rstrip() or EMPTY


def _cells(rows: list[dict]) -> dict[tuple, list[dict]]:
    """What identifies a number -> the rows of the newest commit that measured it."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        names = ("family", "weight_format", "implementation", "mode", "batch", "ranks")
        cells.setdefault(tuple(row.get(name) for name in names), []).append(row)
    for key, found in cells.items():
        newest = max(found, key=lambda row: row["date"])
        cells[key] = [row for row in found if (row["commit"], row["dirty"]) == (newest["commit"], newest["dirty"])]
    return dict(sorted(cells.items(), key=lambda item: [(value is None, value) for value in item[0]]))


def _median(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _logits(cells: dict) -> str:
    out = ["| served / floor: | experts | ranks | positions | KL | top-1 | relative L2 | kernel |", "|--" * 8 + "|"]
    for found in cells.values():
        row = found[-1]
        errors = [f"{_median(found, f'served_{name}'):{form}} / {_median(found, f'floor_{name}'):{form}}"
                  for name, form in ERRORS]  # fmt: skip
        out.append("| " + " | ".join([row["family"], row["weight_format"], str(row["ranks"]), str(row["positions"]),
                                      *errors, row["kernel"]]) + " |")  # fmt: skip
    return "\n".join(out) if cells else ""


def _text(cells: dict) -> str:
    heads = "texts the same as: | experts | ranks | eager's | steps.py's | one rank's | logits off / floor"
    out = [f"| {heads} | largest gap at a fork / allowed | bits per byte |", "|--" * 8 + "|"]
    for found in cells.values():
        if ran := [row for row in found if "same" in row]:
            row = max(ran, key=lambda row: row["date"])
            same = (f"{row['same'][name]} of {row['prompts']}" if name in row["same"] else "-"
                    for name in ("eager", "steps.py", "one rank"))  # fmt: skip
            gap = f"{max(fork['gap'] for fork in row['forks']):.2e}" if row["forks"] else "no fork"
            texts = [f"{row['bytes']} bytes", row["weight_format"], str(row["ranks"]), *same,
                     f"{row['errors']['eager']:.2e} / {row['floor_error']:.2e}", f"{gap} / {row['max_gap']:.2e}",
                     f"{row['bits_per_byte']:.2f}"]  # fmt: skip
            out.append("| " + " | ".join(texts) + " |")
    return "\n".join(out) if len(out) > 2 else ""


def _overhead(cells: dict) -> str:
    out = ["| us, ranks: | layer(...) | layer.forward(...) | of it the launch | GPU, a call to the next |"]
    out.append("|--" * 5 + "|")
    for found in cells.values():
        if ran := [row for row in found if "us_per_call" in row]:
            numbers = (f"{_median(ran, name):.1f}" for name in ("us_per_call", "forward_us", "launch_us", "gpu_us"))
            out.append(f"| {ran[0]['ranks']} | " + " | ".join(numbers) + " |")
    return "\n".join(out) if len(out) > 2 else ""


def _block(cells: dict) -> str:
    ran = {key[2:]: found for key, found in cells.items() if all("us" in row for row in found)}
    columns = sorted({(ranks, batch) for *_, batch, ranks in ran})
    heads = (f"{batch}" + f", {ranks} ranks" * (ranks > 1) for ranks, batch in columns)
    out = ["| us per call, tokens a rank: | " + " | ".join(heads) + " |", "|--" * (len(columns) + 1) + "|"]
    for name in IMPLEMENTATIONS:
        for mode in MODES:
            here = [ran.get((name, mode, batch, ranks)) for ranks, batch in columns]
            if any(here):
                experts = next(found for found in here if found)[0]["experts"]
                label = f"**{name}**" if name == "megamoe" else f"transformers' {name}"
                texts = (f"{_median(found, 'us'):.4g}" if found else "-" for found in here)
                out.append(f"| {label}, {experts} experts, {mode} | " + " | ".join(texts) + " |")
    reasons: dict[str, set[str]] = {}
    for row in (row for found in cells.values() for row in found if "not_run" in row):
        reasons.setdefault(row["not_run"], set()).add(f"{row['implementation']} {row['mode']}")
    if reasons:
        texts = (f"{', '.join(sorted(what))}: {reason}" for reason, what in sorted(reasons.items()))
        out.append("\nNot run: " + "; ".join(texts) + ".")
    return "\n".join(out) if ran else ""


def _certificate(cells: dict) -> str:
    rows = [row for found in cells.values() for row in found]
    commits = sorted({row["commit"][:12] + " with local changes" * bool(row["dirty"]) for row in rows})
    drivers, torches = (sorted({str(row[name]) for row in rows if row[name]}) for name in ("driver", "torch"))
    dates = sorted({row["date"][:10] for row in rows})
    return (f"<sub>Commit {', '.join(commits)}; torch {', '.join(torches)}"
            + f"; driver {', '.join(drivers)}" * bool(drivers)
            + f"; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.</sub>")  # fmt: skip
