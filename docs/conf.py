"""How Sphinx makes the site of these pages: ``make site``, or ``python tools/docs_site.py FOLDER``.

The API reference comes from the docstrings. A page per loss is written to ``docs/api/generated`` before the build reads
the pages, since the losses are listed in ``fastloss.testing.SPECS`` and nowhere else.
"""

import re
from inspect import getdoc, isclass, signature
from pathlib import Path

import fastloss
import fastloss.functional
import fastloss.nn
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from fastloss.testing import SPECS

DOCS = Path(__file__).resolve().parent

project = "fastloss"
author = copyright = "fastloss contributors"
release = version = fastloss.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_static"]
templates_path: list[str] = []

# Markdown and notebooks. Headings have the anchors that code hosts give them.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # they hold their outputs; tests run them

# The API reference.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
nitpicky = True  # a reference to nothing is a warning
# Types of Python, torch and matplotlib; and what is private in a signature.
nitpick_ignore_regex = [("py:.*", r"(?!fastloss).*"), ("py:class", r"fastloss\..*\.(_\w*|Model)")]

html_theme = "furo"
html_title = "fastloss"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"

GENERATED = DOCS / "api" / "generated"
# Several arguments that share a description, on more lines than one.
NAMES = re.compile(r"\s+\w+(, \w+)*,$")
OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]+)\)")


def heading(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n\n.. currentmodule:: fastloss\n\n"


def loss_page(name: str) -> str:
    """The function, and the public classes of the file that it is in."""
    function = getattr(fastloss, name)
    faces = {other: getattr(fastloss, other) for other in fastloss.__all__}
    classes = [n for n, face in faces.items() if isclass(face) and face.__module__ == function.__module__]
    page = heading(name) + f".. autofunction:: {name}\n"
    for cls in classes:
        forward = "   :members: forward\n" if "forward" in vars(faces[cls]) else ""
        page += f"\n.. autoclass:: {cls}\n{forward}"
    return page


def losses_page() -> str:
    rows = "".join(f"   {name}\n" for name in SPECS)
    return (
        heading("Losses")
        + "Functions in the order of :doc:`the table of losses </losses>`; the module of each is on its page.\n\n"
        + f".. toctree::\n   :maxdepth: 1\n\n{rows}"
    )


def namespaces_page() -> str:
    """What ``fastloss.functional`` and ``fastloss.nn`` have instead of, or beyond, torch's."""
    page = heading("fastloss.functional, fastloss.nn")
    for module, role in ((fastloss.functional, "func"), (fastloss.nn, "class")):
        page += f".. automodule:: {module.__name__}\n   :no-members:\n\n"
        page += "Its own are " + ",\n".join(f":{role}:`~fastloss.{name}`" for name in module.__all__) + ".\n\n"
    return page


def write_generated(app: object, config: object) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    pages = {name: loss_page(name) for name in SPECS}
    pages |= {"losses": losses_page(), "namespaces": namespaces_page()}
    for old in GENERATED.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = GENERATED / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def join_names(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Before napoleon reads the docstring, which takes the first line of several names for one name."""
    if obj is fastloss.lazy_head:  # an instance, whose call is what users see
        lines[:] = (getdoc(type(fastloss.lazy_head).__call__) or "").splitlines()
    for i in reversed(range(len(lines) - 1)):
        if NAMES.match(lines[i]) and len(lines[i + 1]) - len(lines[i + 1].lstrip()) > len(lines[i]) - len(
            lines[i].lstrip()
        ):
            lines[i : i + 2] = [f"{lines[i]} {lines[i + 1].lstrip()}"]


def offer_files(app: object, docname: str, source: list[str]) -> None:
    """A link to a file of the repository that is no page here becomes a download of it."""

    def link(match: re.Match[str]) -> str:
        path = (DOCS / docname).parent / match[2]
        if path.resolve().is_relative_to(DOCS):
            return match[0]
        label = " ".join(match[1].replace("`", "").split())
        return f"{{download}}`{label} <{match[2]}>`"

    if not docname.startswith("notebooks/"):
        source[0] = OUTSIDE.sub(link, source[0])


def find_short_names(app: object, env: object, node: nodes.Element, text: nodes.TextElement) -> nodes.Element | None:
    """``:class:`Report``` in a docstring is the only documented name that ends so."""
    objects = env.domaindata["py"]["objects"]  # type: ignore[attr-defined]
    found = [name for name in objects if name.endswith(f".{node['reftarget']}")] if "reftarget" in node else []
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    domain = env.domains.python_domain  # type: ignore[attr-defined]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text)  # type: ignore


def math(self: object, node: nodes.Element) -> None:
    """As MathML, which browsers draw themselves: no script, no network."""
    block = isinstance(node, nodes.math_block)
    how = (
        {"as_block": block} if "as_block" in signature(tex2mathml).parameters else {"inline": not block}
    )  # docutils < 0.22
    self.body.append(tex2mathml(node.astext(), **how))  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: object) -> None:
    app.add_html_math_renderer("mathml", (math, None), (math, None))  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", join_names, priority=400)  # type: ignore[attr-defined]
    for event, hook in (
        ("config-inited", write_generated),
        ("source-read", offer_files),
        ("missing-reference", find_short_names),
    ):
        app.connect(event, hook)  # type: ignore[attr-defined]
