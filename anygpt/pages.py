"""HTML templates of the reports."""

import jinja2


def page_template(package: str, name: str) -> jinja2.Template:
    """HTML template in a package."""
    loader = jinja2.PackageLoader(package, "")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(name)
