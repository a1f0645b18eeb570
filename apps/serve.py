"""Serves a scorer bundle over HTTP: scores, rankings, events, health and counters.

torchx run apps/serve.py --config ml-1m run=ml-1m-rank
torchx run apps/serve.py --bundle runs/ml-1m-rank-bundle --store runs/ml-1m-query serve.workers=2
"""

import torchx.specs as specs


def serve(*words: str, config: str = "ml-1m", bundle: str = "", store: str = "", state: str = "") -> specs.AppDef:
    """Serves a scorer bundle over HTTP: scores, rankings, events, health and counters.

    POST /v1/score and /v1/rank answer with probabilities, /v1/events takes in what users did; /docs explains the API.
    Concurrent requests are computed together; new versions of bundle, store and state are picked up while it serves.
    It listens on 127.0.0.1; for any other address (serve.host) requests have to bring a token (serve.token_file).
    Example: torchx run apps/serve.py --config ml-1m run=ml-1m-rank

    Args:
        words: settings, key=value each, after all options; an unknown key is an error that names the nearest valid one
        config: name of a config that comes with lumrec, or a YAML file
        bundle: run name or folder of the bundle, the same as serve.bundle=
        store: run name, folder or redis:// place of the knowledge store, the same as serve.store=
        state: run name, folder or redis:// place of the users' state, the same as serve.state=
    """
    from lumrec.launch.torchx import single_app

    given = {"serve.bundle": bundle, "serve.store": store, "serve.state": state}
    return single_app("serve", [*words, *(f"{key}={value}" for key, value in given.items() if value)], config=config)


if __name__ == "__main__":
    from lumrec.launch.main import run_command

    run_command("serve")
