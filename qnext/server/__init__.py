"""HTTP over one engine: the routes of OpenAI's and Anthropic's APIs, keys and limits, the page.

`Server` holds what lives as long as the process, an `Exchange` is one request, a `Route` declares one path. From below:
`limits` and `errors`; `access` (who may call); `body` (request bodies); `inference` (the model); `view` (the page);
`server` and `exchange`; `http` (the wire); `surfaces` (the APIs); `table` and `run` at the top. May import planning,
engine and text. A new route: `table.py`. A new limit: `limits.py`. A new API: a folder in `surfaces`.
"""
