"""``qdist emit``."""

from __future__ import annotations

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.cli.schema import EmitSettings
from qdist.emit.qdq import emit_qdq


def run(context: Context[EmitSettings]) -> None:
    """Write the artifact of a plan, also of one edited by hand or found by a search."""
    settings = context.settings
    target = domain.target(settings.target)
    frozen, plan = steps.load_plan_for(
        context.frozen_model(), domain.absolute(settings.plan), context.execution
    )
    projected = target.project(plan)
    path = domain.absolute(settings.artifact)
    with context.tracked(
        params={"target": target.name, "plan": settings.plan}, model_digest=frozen.digest
    ) as tracked:
        with context.working("writing the quantized model"):
            artifact = emit_qdq(
                frozen, projected, path, execution=context.execution, mode=settings.mode
            )
        tracked.log_metrics({"artifact_bytes": artifact.n_bytes, "seconds": context.seconds})
        tracked.set_tags({"qdist.plan_digest": projected.plan.digest})
        tracked.log_artifact(artifact.path, best=True)
        if artifact.data_path is not None:
            tracked.log_artifact(artifact.data_path, best=True)
    facts = (
        ("artifact", str(artifact.path)),
        ("size", f"{artifact.n_bytes / 1e6:.2f} MB"),
        ("mode", artifact.mode),
        ("opset", str(artifact.opset)),
        ("plan", projected.plan.digest[:16]),
    )
    context.console.print(steps.facts_table(f"Artifact for {target.name}", facts))
    context.notes(
        [
            *projected.plan.notes,
            *steps.plan_notes(projected.plan),
            *steps.deployment(projected.plan, context.execution),
        ]
    )
