"""What Tidegate adds to MLflow's own page: a script in its head, `page.js` beside this file.

The script stands in the page itself, so that it runs before MLflow's and needs no request of its own, whatever prefix
MLflow is served under.
"""

from functools import cache
from importlib.resources import files


@cache
def _script() -> str:
    return files("registry").joinpath("page.js").read_text(encoding="utf-8")


def with_script(html: str) -> str:
    """MLflow's page with the script in its head; a page without a head stays what it is."""
    return html.replace("<head>", f"<head><script>(() => {{\n{_script()}}})();</script>", 1)
