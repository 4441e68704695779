"""HTML pages from the package's templates."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("pdiff_ray", "reports/templates"))
    return environment.get_template(template).render(**values)
