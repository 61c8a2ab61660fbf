"""`python -m tests.chaos`: see the package; exit status 0 if every promise was kept."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import Campaign, say


def main() -> int:
    """Run one campaign; on a bad end the evidence stays, on a good one nothing does."""
    num_faults = int(os.environ.get("CHAOS_FAULTS") or 40)
    seed = int(os.environ.get("CHAOS_SEED") or 1)
    kinds = [kind for kind in os.environ.get("CHAOS_KINDS", "").split(",") if kind]
    mutation = os.environ.get("CHAOS_MUTATION") or None
    if num_faults < 1:
        sys.exit("CHAOS_FAULTS must be at least 1")
    folder = Path(tempfile.mkdtemp(prefix="synthrep-chaos-"))
    say(f"CHAOS_FAULTS={num_faults} CHAOS_SEED={seed}" + (f" {mutation}" if mutation else ""))
    campaign = Campaign(folder, num_faults=num_faults, seed=seed, kinds=kinds, mutation=mutation)
    try:
        verdict = campaign.run()
        is_green = campaign.is_green(verdict)
        if not is_green:
            for finding in verdict.findings[:20]:
                say(finding)
            say(f"data: {campaign.keep_evidence()}, logs of the processes: {folder}")
    finally:
        campaign.close()
    summary = campaign.summary(verdict)
    if is_green:
        shutil.rmtree(folder, ignore_errors=True)
    say(summary)
    return 0 if is_green else 1


if __name__ == "__main__":
    sys.exit(main())
