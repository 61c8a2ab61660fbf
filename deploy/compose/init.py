"""Makes the secrets of a fresh stack, and leaves those that are there as they are.

    python deploy/compose/init.py FOLDER [REDIS_HOST]

Every file is for one purpose and one kind of reader; keys are random. Needs nothing but Python, so
that the same files can be made by hand for a cluster, see docs/deployment.md.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from pathlib import Path

_KEY_BYTES = 32
_READABLE_BY_OWNER = 0o400


def make_secrets(folder: Path, *, redis_host: str = "redis") -> list[str]:
    """Write the files that are absent; returns their names."""
    made: list[str] = []

    def keep(name: str, text: str) -> str:
        path = folder / name
        if not path.exists():
            aside = path.with_suffix(".new")
            aside.unlink(missing_ok=True)
            aside.touch(mode=0o600)
            aside.write_text(text)
            aside.chmod(_READABLE_BY_OWNER)
            aside.rename(path)
            made.append(name)
        return path.read_text()

    key = keep("api-key", secrets.token_hex(_KEY_BYTES))
    metrics_key = keep("metrics-key", secrets.token_hex(_KEY_BYTES))
    keep("api-keys.json", json.dumps([
        {"name": "operator", "key_sha256": _sha256(key)},
        {"name": "metrics", "key_sha256": _sha256(metrics_key), "scopes": ["read"],
         "datasets": ["*"]},
    ]))  # fmt: skip
    password = keep("redis-password", secrets.token_hex(_KEY_BYTES))
    keep("redis-auth.conf", f"requirepass {password}\n")
    keep("redis-url", f"redis://:{password}@{redis_host}:6379/0")
    store_key = keep("s3-secret-key", secrets.token_hex(_KEY_BYTES))
    keep("aws-credentials", "[default]\naws_access_key_id = synthrep\n"
                            f"aws_secret_access_key = {store_key}\n")  # fmt: skip
    keep("s3.json", json.dumps({"identities": [{
        "name": "synthrep",
        "credentials": [{"accessKey": "synthrep", "secretKey": store_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }]}))  # fmt: skip
    keep("grafana-password", secrets.token_hex(_KEY_BYTES))
    return made


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Make them, and say where the key is."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    made = make_secrets(folder, redis_host=sys.argv[2] if len(sys.argv) > 2 else "redis")
    sys.stdout.write(f"made: {', '.join(made)}\n" if made else "every secret is there already\n")
    sys.stdout.write(
        "read the API key: docker compose exec generator-api cat /run/synthrep/api-key\n"
    )


if __name__ == "__main__":
    main()
