"""The stub of the compiled module names what the module has, and nothing else."""

import ast
import re
from pathlib import Path

from mlpint import _core

STUB = Path(__file__).resolve().parent.parent / "python" / "mlpint" / "_core.pyi"


def is_public(name):
    return name == "__init__" or not name.startswith("_")


def stated_interface():
    """What the stub says that the module has.

    Each public name with None, or for a class with its bases and its members; a member is the kind of an attribute, or
    the names of a method's arguments, None for those that are given by position alone.
    """
    return {
        name: ([ast.unparse(base) for base in node.bases], stated_members(node))
        if isinstance(node, ast.ClassDef)
        else None
        for name, node in definitions(ast.parse(STUB.read_text()))
    }


def definitions(node):
    for statement in node.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            name = statement.name
        elif isinstance(statement, ast.AnnAssign):
            name = statement.target.id
        else:
            continue
        if is_public(name):
            yield name, statement


def stated_members(node):
    members = {}
    for name, member in definitions(node):
        if isinstance(member, ast.AnnAssign):
            constant = ast.unparse(member.annotation).startswith("ClassVar")
            members[name] = "constant" if constant else "writable property"
            continue
        decorators = [ast.unparse(decorator) for decorator in member.decorator_list]
        if "property" in decorators:
            members[name] = "property"
        else:
            arguments = [*(None for _ in member.args.posonlyargs), *(a.arg for a in member.args.args)]
            members[name] = arguments if "staticmethod" in decorators else arguments[1:]
    return members


def compiled_interface():
    """What the module has, in the form of :func:`stated_interface`."""
    return {
        name: (compiled_bases(value), compiled_members(value)) if isinstance(value, type) else None
        for name, value in vars(_core).items()
        if is_public(name)
    }


def compiled_bases(cls):
    return [base.__name__ for base in cls.__bases__ if base.__name__ != "pybind11_object"]


def compiled_members(cls):
    members = {}
    for name in filter(is_public, vars(cls)):
        member = vars(cls)[name]
        if isinstance(member, cls):
            members[name] = "constant"
        elif isinstance(member, property):
            members[name] = "property" if member.fset is None else "writable property"
        elif (signature := signature_of(getattr(cls, name))) is not None:
            members[name] = signature
    return members


def signature_of(method):
    """The arguments in pybind11's docstring, ``name(self: Type, argument: Type) -> Type``; None where it wrote none."""
    signature = re.match(r"\w+\((.*)\) -> ", method.__doc__)
    if signature is None:
        return None
    types = signature[1]
    while types != (types := re.sub(r"\[[^\[\]]*\]", "", types)):
        pass  # The types in brackets go from the inside out.
    names = [name for name in re.findall(r"(\w+): ", types) if name != "self"]
    return [None if re.fullmatch(r"arg\d+", name) else name for name in names]


def test_stub_and_compiled_module_have_the_same_names():
    assert stated_interface() == compiled_interface()
