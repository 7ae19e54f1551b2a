"""`python -m flows.processes.mlflow_server PORT`: MLflow's server with its pages, for this machine's user only.

`mlflow server` has no credential, and lets pages of any port of this machine write. Here the same application runs
behind `stages.access.guard`. Its key (SFT_MLFLOW_API_KEY) and the address of the store (SFT_MLFLOW_STORE), which may
contain a password, are variables: every user can read a command line.
"""

from __future__ import annotations

import os
import sys

import uvicorn

from flows.processes.servers import HOST
from stages.access.guard import KeyRequired, OwnOriginOnly

KEY, STORE = "SFT_MLFLOW_API_KEY", "SFT_MLFLOW_STORE"
WAY_OUT = "open the link that `sft ui` printed when it was last started"


def main(argv: list[str]) -> int:
    """Serve on a port until a signal; refuse to serve without a key."""
    key, store = os.environ.pop(KEY, ""), os.environ[STORE]
    if not key:
        print(f"error: {KEY} is not set, and without it anyone could change the record")
        return 1
    # as `mlflow server` does; the application reads the variables when it is imported
    from mlflow.server.constants import (
        ARTIFACT_ROOT_ENV_VAR,
        ARTIFACTS_DESTINATION_ENV_VAR,
        BACKEND_STORE_URI_ENV_VAR,
        REGISTRY_STORE_URI_ENV_VAR,
        SERVE_ARTIFACTS_ENV_VAR,
    )

    artifacts = "mlflow-artifacts:/"
    os.environ.update(
        {
            BACKEND_STORE_URI_ENV_VAR: store,
            REGISTRY_STORE_URI_ENV_VAR: store,
            ARTIFACT_ROOT_ENV_VAR: artifacts,
            ARTIFACTS_DESTINATION_ENV_VAR: "./mlartifacts",
            SERVE_ARTIFACTS_ENV_VAR: "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            "_MLFLOW_IN_JOB_EXECUTOR": "false",
            "MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*,localhost:*",
        }
    )
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    from stages.tracking.store import create_database

    create_database(store)
    initialize_backend_stores(store, store, artifacts)
    guarded = OwnOriginOnly(KeyRequired(app, key, in_path=True, way_out=WAY_OUT), json_only=False)
    # the log of requests would contain the key
    uvicorn.run(guarded, host=HOST, port=int(argv[0]), access_log=False, log_level="info")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
