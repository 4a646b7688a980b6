"""Write docker/grafana/dashboard.json from the panels below: python tools/dashboard.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "docker/grafana/dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WHERE = 'server=~"$server",model=~"$model"'
SPACE = 'namespace=~"$namespace"'
OUTPUT, HIT = ',kind="output"', ',tier!="miss"'


def p(quantile: float, metric: str, by: str, where: str) -> str:
    return f"histogram_quantile({quantile}, sum by ({by}, le) (rate({metric}_bucket{{{where}}}[$__rate_interval])))"


def both(metric: str, by: str, where: str) -> dict[str, str]:
    return {f"{{{{{by}}}}} p{round(100 * quantile)}": p(quantile, metric, by, where) for quantile in (0.5, 0.95)}


def rate(metric: str, by: str, where: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


# Row -> panels: (title, unit, what it shows, {legend: expression}).
ROWS: dict[str, list[tuple[str, str, str, dict[str, str]]]] = {
    "Chat": [
        ("Calls", "reqps", "Calls of the model server, by how they ended. `left`: nobody waited for the end.",
         {"{{model}} {{outcome}}": rate("aegis_chat_calls_total", "model, outcome", WHERE)}),
        ("Speed of one call", "none", "Tokens per second while an answer is written.",
         {"{{model}}": f"{rate('aegis_chat_tokens_total', 'model', WHERE + OUTPUT)} / "
                       f"{rate('aegis_chat_generation_seconds_total', 'model', WHERE)}"}),
        ("Time to the first token", "s", "Of streamed calls.",
         both("aegis_chat_first_token_seconds", "model", WHERE)),
        ("Time to a whole answer", "s", "From the request to the end; without the wait for a slot.",
         both("aegis_chat_seconds", "model", WHERE)),
        ("Tokens", "none", "Per second, of prompts (input) and answers (output).",
         {"{{model}} {{kind}}": rate("aegis_chat_tokens_total", "model, kind", WHERE)}),
        ("Cut and refused", "reqps", "Answers that were cut at their end, and prompts that did not fit.",
         {"{{model}} answer cut": rate("aegis_chat_finishes_total", "model", f'{WHERE},reason="length"'),
          "{{model}} prompt too long": rate("aegis_chat_calls_total", "model",
                                            f'{WHERE},outcome="AegisContextOverflowError"')}),
    ],
    "Cache": [
        ("Hit rate", "percentunit", "Lookups that were answered, of all.",
         {"{{namespace}}": f"{rate('aegis_cache_lookups_total', 'namespace', SPACE + HIT)} / "
                           f"{rate('aegis_cache_lookups_total', 'namespace', SPACE)}"}),
        ("Lookups", "reqps", "By the tier that answered.",
         {"{{tier}}": rate("aegis_cache_lookups_total", "tier", SPACE)}),
        ("Why not", "reqps", "Reasons of misses; a call may have several. docs/cache.md explains each.",
         {"{{reason}}": f"topk(10, {rate('aegis_cache_misses_total', 'reason', SPACE)})"}),
        ("Time of a lookup", "s", "95 % take no longer, by the tier that answered.",
         {"{{tier}} p95": p(0.95, "aegis_cache_lookup_seconds", "tier", SPACE)}),
        ("Saved", "s", "Seconds of generation that hits saved, per second.",
         {"{{namespace}}": rate("aegis_cache_saved_seconds_total", "namespace", SPACE)}),
        ("Answers kept", "short", "That can be served now, of all processes.",
         {"{{namespace}}": f"max by (namespace) (aegis_cache_entries{{{SPACE}}})"}),
    ],
    "Admission": [
        ("Slots", "short", "Calls that run, and how many may.",
         {"{{server}} running": 'sum by (server) (aegis_admission_running{server=~"$server"})',
          "{{server}} slots": 'sum by (server) (aegis_admission_slots{server=~"$server"})'}),
        ("Queue", "short", "Calls that wait, and how many may; more are refused. Batches wait without counting.",
         {"{{server}} waiting": 'sum by (server) (aegis_admission_waiting{server=~"$server"})',
          "{{server}} places": 'sum by (server) (aegis_admission_places{server=~"$server"})',
          "{{server}} batches": 'sum by (server) (aegis_admission_waiting_uncounted{server=~"$server"})'}),
        ("Wait for a slot", "s", "95 % wait no longer.",
         {"{{model}} p95": p(0.95, "aegis_admission_wait_seconds", "model", WHERE)}),
        ("What became of calls", "reqps", "Merged: answered by an identical call. Refused: the queue was full.",
         {"{{event}}": rate("aegis_admission_calls_total", "event", WHERE)}),
    ],
    "Server": [
        ("Answers", "bool_on_off", "Whether the server answers.", {"{{server}}": 'aegis_server_up{server=~"$server"}'}),
        ("Memory of loaded models", "bytes", "With their windows. Below it on the GPU: the rest is on the CPU.",
         {"{{model}}": f"max by (server, model) (aegis_server_model_bytes{{{WHERE}}})",
          "{{model}} on the GPU": f"max by (server, model) (aegis_server_model_vram_bytes{{{WHERE}}})"}),
        ("Loads", "short", "Per hour: calls that waited for a load; models found loaded anew; models found gone.",
         {"{{model}} waits": f"sum by (model) (increase(aegis_chat_load_waits_total{{{WHERE}}}[1h]))",
          "{{model}} loads": f"max by (model) (increase(aegis_server_model_loads_total{{{WHERE}}}[1h]))",
          "{{model}} evictions": f"max by (model) (increase(aegis_server_model_evictions_total{{{WHERE}}}[1h]))"}),
        ("Window", "short", "Tokens of a slot of a loaded model.",
         {"{{model}}": f"max by (server, model) (aegis_server_model_window_tokens{{{WHERE}}})"}),
    ],
}  # fmt: skip


def panel(number: int, title: str, unit: str, about: str, targets: dict[str, str], x: int, y: int) -> dict[str, Any]:
    share = {"min": 0, "max": 1} if unit == "percentunit" else {"min": 0}
    return {
        "id": number, "type": "timeseries", "title": title, "description": about, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, **share, "custom": {"fillOpacity": 8, "showPoints": "never"}},
                        "overrides": []},
        "options": {"legend": {"showLegend": True, "displayMode": "table", "placement": "bottom",
                               "calcs": ["mean", "max"]},
                    "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [{"refId": "ABC"[at], "datasource": SOURCE, "expr": expression, "legendFormat": legend}
                    for at, (legend, expression) in enumerate(targets.items())],
    }  # fmt: skip


def variable(name: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "name": name, "label": name, "type": "query", "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": name}, "includeAll": True, "multi": True, "refresh": 2, "sort": 1,
        "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return what Grafana reads."""
    panels, y = [], 0
    for row, members in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})  # fmt: skip
        y += 1
        for at, member in enumerate(members):
            panels.append(panel(len(panels) + 1, *member, x=at % 3 * 8, y=y + at // 3 * 8))
        y += (len(members) + 2) // 3 * 8
    return {
        "uid": "langchain-aegis", "title": "langchain-aegis", "tags": ["ollama", "langchain"], "editable": False,
        "schemaVersion": 41, "version": 1, "timezone": "browser", "refresh": "30s", "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
            variable("server", "aegis_admission_slots"), variable("model", "aegis_chat_calls_total"),
            variable("namespace", "aegis_cache_lookups_total"),
        ]},
        "annotations": {"list": []}, "links": [], "panels": panels,
    }  # fmt: skip


def text() -> str:
    """Return the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
