"""What a comparison looks like: as a table, as a plot, in its MLflow run. Knows the numbers and not how they came."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np

from phi3_mlflow.layout import COLOURS, GREY, counted, markdown, name_axes, short, size, time
from phi3_mlflow.machine import line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 28  # characters of a model's name in a plot
_STYLES = ("-", "--", ":", "-.")  # lines that lie on each other are seen all the same


def table(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown that is aligned for a terminal, with 95 % intervals; below it the gate's verdicts."""
    models = result["models"]
    scores = list(dict.fromkeys(name for model in models for name in model["scores"]))
    rows = [["right", *(_share(model["right"]) for model in models)]] if models[0]["right"] else []
    rows += [[f"  {name}", *(_share(model["scores"].get(name)) for model in models)] for name in scores]
    rows += [
        ["tokens/s", *(_number(model["tokens_per_second"]) for model in models)],
        ["first token", *(_time(model["first_token_ms"]) for model in models)],
        ["answer", *(_time(model["answer_ms"]) for model in models)],
        ["memory", *(size(model["memory_bytes"]) for model in models)],
        ["size on disk", *(size(model["size_bytes"]) for model in models)],
        ["same answers", *(_share((model["agreement"] or {}).get("same")) for model in models)],
        ["drift, nats a token", *(_number((model["agreement"] or {}).get("drift")) for model in models)],
    ]
    lines = [
        line(result["machine"]),
        "\n".join(f"{model['model']}: {_describe(model)}" for model in models),
        f"{counted(result['questions'], 'question')}; in brackets 95 % intervals:",
        markdown(["", *(model["model"] for model in models)], rows),
    ]
    if "gate" in result:
        lines.append(_verdicts(result["gate"]))
    return "\n\n".join(lines)


def figure(result: Mapping[str, Any]) -> "Figure":
    """Quality against speed, the distributions of latency and of tokens/s, and where answers part."""
    from matplotlib.figure import Figure

    models = result["models"]
    plot = Figure(figsize=(12, 8.6), dpi=150, layout="constrained")
    plot.suptitle(f"{len(models)} models, {counted(result['questions'], 'question')}", fontsize=13, weight="bold")
    (quality, latency), (speed, parting) = plot.subplots(2, 2)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(models))]
    names = [_cut(model["model"]) for model in models]
    by_model = [[row for row in result["answers"] if row["model"] == model["model"]] for model in models]

    _quality(quality, models, names, colours)
    times = [[row["total_ms"] for row in rows] for rows in by_model]
    _latency(latency, times, names, colours)
    rates = [[row["tokens"] / row["total_ms"] * 1000 for row in rows] for rows in by_model]
    _speed(speed, rates, names, colours)
    _parting(parting, by_model, names, colours)
    plot.supxlabel(f"{line(result['machine'])}; bars and dots with 95 % intervals", fontsize=8, color=GREY)
    return plot


def log_run(result: Mapping[str, Any]) -> None:
    """Puts the result into the active MLflow run: params, plot, and what `log_verdict` does."""
    models = result["models"]
    params: dict[str, Any] = {f"model_{index}": model["loaded"] for index, model in enumerate(models, 1)}
    mlflow.log_params({**params, "questions": result["questions"], "machine": line(result["machine"])})
    if "gate" in result:
        gate = result["gate"]
        mlflow.log_params({f"gate_{name}": value for name, value in gate["bounds"].items()})
    mlflow.log_figure(figure(result), "compare.png")
    log_verdict(result)


def log_verdict(result: Mapping[str, Any]) -> None:
    """Puts table, answers and the gate's verdict, as a tag, into the result's run, in place of earlier ones."""
    client, run = mlflow.MlflowClient(), result["run_id"]
    if "gate" in result:
        client.set_tag(run, "phi3_gate", "passed" if result["gate"]["passed"] else "refused")
    client.log_text(run, table(result) + "\n", "compare.md")
    client.log_dict(run, dict(result), "compare.json")


def _quality(axes: "Axes", models: Sequence[Mapping[str, Any]], names: Sequence[str], colours: Sequence[str]) -> None:
    name_axes(axes, "Quality against speed", "tokens/s", "questions answered rightly (%)")
    if models[0]["right"] is None:
        axes.text(0.5, 0.5, "no question expects anything", ha="center", color=GREY, transform=axes.transAxes)
        return
    for model, name, colour in zip(models, names, colours, strict=True):
        right, rate = model["right"], model["tokens_per_second"]
        axes.errorbar(
            rate["value"],
            100 * right["value"],
            xerr=_reach(rate, 1),
            yerr=_reach(right, 100),
            color=colour,
            marker="o",
            markersize=8,
            capsize=3,
            linewidth=1.2,
            label=name,
        )
    axes.set_xlim(0, max(model["tokens_per_second"]["high"] for model in models) * 1.1)
    lowest = min(100 * model["right"]["low"] for model in models)
    axes.set_ylim(max(0, lowest - 8), 102)
    axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= 100])


def _reach(estimate: Mapping[str, float], scale: float) -> list[list[float]]:
    """How far an interval reaches to both sides of the value."""
    value = estimate["value"]
    return [[scale * max(0.0, value - estimate["low"])], [scale * max(0.0, estimate["high"] - value)]]


def _latency(axes: "Axes", times: Sequence[Sequence[float]], names: Sequence[str], colours: Sequence[str]) -> None:
    seconds = max(map(max, times)) >= 2000
    for values, name, colour in zip(times, names, colours, strict=True):
        ordered = np.sort(values) / (1000 if seconds else 1)
        shares = np.arange(1, len(ordered) + 1) / len(ordered) * 100
        axes.step(ordered, shares, where="post", color=colour, linewidth=2, label=name)
        middle = float(np.median(ordered))
        axes.plot([middle], [50], color=colour, marker="o")
    axes.axhline(50, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right")
    unit = "s" if seconds else "ms"
    name_axes(axes, "Latency of whole answers", f"time to the end of the answer ({unit})", "answers done by then (%)")


def _speed(axes: "Axes", rates: Sequence[Sequence[float]], names: Sequence[str], colours: Sequence[str]) -> None:
    places = range(len(rates))
    spread = np.random.default_rng(0)
    for place, values, colour in zip(places, rates, colours, strict=True):
        axes.scatter(place + spread.uniform(-0.16, 0.16, len(values)), values, s=12, color=colour, alpha=0.45, lw=0)
        middle = float(np.median(values))
        axes.hlines(middle, place - 0.28, place + 0.28, color=colour, linewidth=2.5)
        _note(axes, short(middle), (place + 0.3, middle))
    axes.set_xticks(list(places), names)
    axes.set_xlim(-0.6, len(rates) - 0.3)
    axes.set_ylim(0, max(map(max, rates)) * 1.1)
    name_axes(axes, "Tokens per second", "each answer, and the median", "tokens/s")


def _parting(
    axes: "Axes", by_model: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str], colours: Sequence[str]
) -> None:
    longest = max(row["agreement"]["tokens"] for rows in by_model[1:] for row in rows)
    for index, (rows, colour) in enumerate(zip(by_model[1:], colours[1:], strict=True)):
        first = np.array([np.inf if (at := row["agreement"]["first_difference"]) is None else at for row in rows])
        shares = [100 * float(np.mean(first >= length)) for length in range(longest + 1)]
        style = _STYLES[index % len(_STYLES)]
        axes.step(range(longest + 1), shares, where="post", color=colour, linewidth=2, linestyle=style)
        _note(axes, f"{shares[-1]:.0f} %", (longest, shares[-1]))
    axes.set_ylim(0, 104)
    axes.set_xlim(0, longest * 1.08)
    title = f"Where answers part from those of {names[0]}"
    name_axes(axes, title, "tokens of the answer", "answers that are still the same (%)")


def _note(axes: "Axes", text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", color=GREY, fontsize=9)


def _describe(model: Mapping[str, Any]) -> str:
    facts = model["facts"]
    loaded = "" if model["loaded"] == model["uri"] else f" ({model['loaded']})"
    return f"{facts['builder']}, {facts['quantization']}, {facts['weights_source']}{loaded}"


def _verdicts(gate: Mapping[str, Any]) -> str:
    lines = [
        f"{'kept  ' if verdict['kept'] else 'broken'}  {verdict['bound']:9}  {verdict['detail']}"
        for verdict in gate["verdicts"]
    ]
    before = "new" if gate["before"] is None else f"was version {gate['before']}"
    end = f"the alias {gate['alias']} of {gate['model']} "
    end += f"means version {gate['version']} ({before})" if gate["passed"] else "stays as it is"
    return "\n".join([*lines, end])


def _share(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['value']:.1f} % [{low:.0f}, {high:.0f}]"


def _number(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{short(estimate['value'])} [{short(estimate['low'])}, {short(estimate['high'])}]"


def _time(estimate: Mapping[str, float]) -> str:
    return f"{time(estimate['value'])} [{time(estimate['low'])}, {time(estimate['high'])}]"


def _cut(name: str) -> str:
    """Its middle goes: names of versions differ at the end."""
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[:half]}…{name[1 - half :]}"
