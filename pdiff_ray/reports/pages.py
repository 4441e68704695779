"""HTML pages from the package's templates."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Returns a page made from one of the package's templates."""
    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("pdiff_ray", "reports/templates"))
    return environment.get_template(template).render(**values)
