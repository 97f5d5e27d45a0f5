"""How to call a deployed model: request bodies by task, and working calls in five languages.

The key is taken from an environment variable in every one of them; it knows no key.
"""

import json
import pprint
import shlex
from typing import Any

KEY_VARIABLE = "AZURE_ENDPOINT_KEY"
LANGUAGES = ("curl", "Python", "JavaScript", "C#", "R")


def request_body(mode: str, task: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A request that the deployed model takes.

    Args:
        mode: "ncd" or "container".
        task: "flat", "llm/v1/chat" or "llm/v1/completions".
        prompt: the user's text.
        max_tokens: the longest answer, in tokens.
    """
    params = {"max_tokens": max_tokens}
    if mode == "ncd":
        return {"input_data": {"columns": ["prompt"], "index": [0], "data": [[prompt]]}, "params": params}
    if task == "llm/v1/chat":
        return {"messages": [{"role": "user", "content": prompt}], **params}
    if task == "llm/v1/completions":
        return {"prompt": prompt, **params}
    return {"dataframe_split": {"columns": ["prompt"], "data": [[prompt]]}, "params": params}


def answer_text(body: Any) -> str:
    """The text of an answer, whichever way the model is served; "" where there is none."""
    while isinstance(body, (list, dict)):
        if isinstance(body, list):
            body = body[0] if body else ""
        elif "predictions" in body:
            body = body["predictions"]
        elif "choices" in body:
            choice = (body["choices"] or [{}])[0]
            body = (choice.get("message") or {}).get("content") or choice.get("text") or ""
        else:
            body = next(iter(body.values()), "")
    return str(body) if body is not None else ""


def render(uri: str, body: dict[str, Any], timeout: int) -> dict[str, str]:
    """A call in each of `LANGUAGES`.

    Args:
        uri: the endpoint's scoring address.
        body: the request.
        timeout: seconds to wait for the answer.
    """
    line = json.dumps(body)
    pretty = json.dumps(body, indent=2)
    return {
        "curl": f"""curl -sS {shlex.quote(uri)} --max-time {timeout} \\
  -H "Authorization: Bearer ${KEY_VARIABLE}" -H 'Content-Type: application/json' \\
  -d {shlex.quote(line)}""",
        "Python": f"""import json, os, urllib.request

body = {pprint.pformat(body, sort_dicts=False)}
request = urllib.request.Request(
    {uri!r},
    json.dumps(body).encode(),
    {{"Authorization": "Bearer " + os.environ["{KEY_VARIABLE}"], "Content-Type": "application/json"}},
)
with urllib.request.urlopen(request, timeout={timeout}) as response:
    print(json.load(response))""",
        "JavaScript": f"""const body = {pretty};
const response = await fetch({json.dumps(uri)}, {{
  method: "POST",
  headers: {{ Authorization: `Bearer ${{process.env.{KEY_VARIABLE}}}`, "Content-Type": "application/json" }},
  body: JSON.stringify(body),
  signal: AbortSignal.timeout({timeout * 1000}),
}});
if (!response.ok) throw new Error(`${{response.status}} ${{await response.text()}}`);
console.log(JSON.stringify(await response.json()));""",
        "C#": f"""using System.Net.Http.Headers;
using System.Text;

var body = \"\"\"
{pretty}
\"\"\";
using var client = new HttpClient {{ Timeout = TimeSpan.FromSeconds({timeout}) }};
var key = Environment.GetEnvironmentVariable("{KEY_VARIABLE}");
client.DefaultRequestHeaders.Authorization = new AuthenticationHeaderValue("Bearer", key);
var content = new StringContent(body, Encoding.UTF8, "application/json");
var response = await client.PostAsync({json.dumps(uri)}, content);
response.EnsureSuccessStatusCode();
Console.WriteLine(await response.Content.ReadAsStringAsync());""",
        "R": f"""library(httr2)

body <- r"---({line})---"
response <- request({json.dumps(uri)}) |>
  req_auth_bearer_token(Sys.getenv("{KEY_VARIABLE}")) |>
  req_body_raw(body, type = "application/json") |>
  req_timeout({timeout}) |>
  req_perform()
cat(resp_body_string(response))""",
    }
