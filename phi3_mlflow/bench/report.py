"""What a measurement looks like: as a table, as a plot, as an MLflow run. Knows the numbers and not how they came."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlflow

from phi3_mlflow import cards
from phi3_mlflow.layout import BLUE, GREY, ORANGE, counted, markdown, name_axes, short, size, time
from phi3_mlflow.machine import line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADROOM = 1.2  # above the highest bar, for numbers and the legend
_MEMORY = {"before_loading_bytes": "before loading", "after_loading_bytes": "after loading", "peak_bytes": "at most"}


def table(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown that is aligned for a terminal, below the machine, the model and the versions."""
    settings, prefix = result["settings"], result["prefix"]
    requests = [
        [
            str(row["requests"]),
            f"{row['tokens_per_second']:.1f}",
            time(row["first_token_ms"]),
            time(row["first_token_worst_ms"]),
            time(row["per_token_ms"]),
        ]
        for row in result["concurrency"]
    ]
    prefixes = [
        [f"{settings['prefix']} shared tokens {name}", time(case["first_token_ms"]), f"{case['cached_tokens']:g}"]
        for name, case in _cases(prefix).items()
    ]
    parts = [
        describe(result),
        f"Prompts of {result['concurrency'][0]['prompt_tokens']} tokens, answers of {settings['tokens']}, medians of "
        f"{counted(settings['rounds'], 'round')}:",
        markdown(["requests at once", "tokens/s in all", "first token", "worst", "per token"], requests),
        markdown([f"prompt of {prefix['prompt_tokens']} tokens", "first token", "tokens cached"], prefixes),
        markdown(["memory", "of the process"], [[text, size(result["memory"][key])] for key, text in _MEMORY.items()]),
    ]
    return "\n\n".join(parts)


def describe(result: Mapping[str, Any]) -> str:
    """A line for the machine, and a line for the model and the versions of what runs it."""
    model = result["model"]
    uri = "" if model["uri"] == "embedded" else f" ({model['uri']})"
    subject = f"{model['name']}{uri}, {_how(model)}, parallel {model['parallel']}"
    return f"{line(result['machine'])}\n{subject}, {_versions(result)}"


def figure(result: Mapping[str, Any]) -> "Figure":
    """Tokens/s against concurrency, the first token against concurrency, and the first token by prefix."""
    from matplotlib.figure import Figure

    rows, settings, prefix = result["concurrency"], result["settings"], result["prefix"]
    plot = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    model = result["model"]
    plot.suptitle(f"{model['name']}  ({_how(model)}, parallel {model['parallel']})", fontsize=13, weight="bold")
    rates, firsts, prefixes = plot.subplots(1, 3, width_ratios=[1.3, 1.3, 1])

    names = [str(row["requests"]) for row in rows]
    speeds = [row["tokens_per_second"] for row in rows]
    rates.plot(names, speeds, color=BLUE, marker="o", linewidth=2)
    for name, speed in zip(names, speeds, strict=True):
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        rates.annotate(
            short(speed), (name, speed), (0, 9), textcoords="offset points", ha="center", color=GREY, bbox=background
        )
    rates.margins(x=0.12)
    rates.set_ylim(0, max(speeds) * _HEADROOM)
    prompt = rows[0]["prompt_tokens"]
    name_axes(
        rates, "Throughput", "requests at once", f"tokens/s in all (prompt {prompt}, answer {settings['tokens']})"
    )

    scale, unit = _unit([row["first_token_worst_ms"] for row in rows])
    width = 0.4
    for shift, key, label, colour in (
        (-width / 2, "first_token_ms", "median", BLUE),
        (width / 2, "first_token_worst_ms", "worst", ORANGE),
    ):
        places = [place + shift for place in range(len(rows))]
        _bars(firsts, places, [row[key] / scale for row in rows], colour, width, label)
    firsts.set_xticks(range(len(rows)), names)
    firsts.set_ylim(0, firsts.get_ylim()[1] * 1.08)
    firsts.legend(frameon=False, loc="upper left", ncols=2)
    name_axes(firsts, "First token", "requests at once", f"time to first token ({unit})")

    cases = _cases(prefix)
    scale, unit = _unit([case["first_token_ms"] for case in cases.values()])
    times = [case["first_token_ms"] / scale for case in cases.values()]
    _bars(prefixes, range(len(times)), times, [GREY, BLUE], 0.55)
    labels = [f"prefix {name}\n{case['cached_tokens']:g} cached" for name, case in cases.items()]
    prefixes.set_xticks(range(len(times)), labels)
    name_axes(prefixes, "Shared prefix", f"prompt of {prefix['prompt_tokens']} tokens", f"time to first token ({unit})")

    plot.supxlabel(f"{line(result['machine'])}; {_versions(result)}", fontsize=8, color=GREY)
    return plot


def log_run(result: Mapping[str, Any], model_id: str | None = None) -> None:
    """Puts the result into the active MLflow run: params, metrics (one step for each concurrency), plot and table.

    Args:
        result: what was measured.
        model_id: the logged model whose page gets the metrics too, and whose registered versions the table.
    """
    facts = {
        "machine": line(result["machine"]),
        **{f"version {name}": text for name, text in result["versions"].items()},
    }
    mlflow.log_params(
        {**{f"model_{key}": value for key, value in result["model"].items()}, **result["settings"], **facts}
    )
    for row in result["concurrency"]:
        numbers = {name: value for name, value in row.items() if name != "requests" and value is not None}
        mlflow.log_metrics(numbers, step=row["requests"], model_id=model_id)
    prefixes = {
        f"prefix_{name}_{key}": value for name, case in _cases(result["prefix"]).items() for key, value in case.items()
    }
    memory = {f"memory_{name}": value for name, value in result["memory"].items() if value is not None}
    mlflow.log_metrics({**prefixes, **memory}, model_id=model_id)
    mlflow.log_figure(figure(result), "bench.png")
    mlflow.log_text(table(result) + "\n", "bench.md")
    mlflow.log_dict(dict(result), "bench.json")
    if model_id is not None:
        cards.note(model_id, table(result))


def _cases(prefix: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cases of the prefix measurement by their names."""
    return {name: case for name, case in prefix.items() if isinstance(case, Mapping)}


def _how(model: Mapping[str, Any]) -> str:
    """The builder, and the engine where it has another name."""
    builder, engine = model["builder"], model["engine"]
    return builder if engine in (builder, None) else f"{builder} through {engine}"


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {number}" for package, number in result["versions"].items())


def _unit(milliseconds: Sequence[float]) -> tuple[float, str]:
    return (1000.0, "s") if max(milliseconds) >= 2000 else (1.0, "ms")


def _bars(
    axes: "Axes", places: Sequence[float], heights: list[float], colour: Any, width: float, label: str = ""
) -> None:
    bars = axes.bar(places, heights, color=colour, width=width, label=label)
    axes.bar_label(
        bars, [short(height) for height in heights], padding=3, fontsize=9 if len(heights) <= 5 else 6, color=GREY
    )
    axes.set_ylim(0, max(axes.get_ylim()[1], max(heights) * _HEADROOM))
