"""What imports what in lumrec; `make lint` has the order of the folders."""

import graphlib

import grimp


def test_no_files_import_each_other_in_a_circle():
    """Not even behind TYPE_CHECKING or inside a function."""
    graph = grimp.build_graph("lumrec", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files
