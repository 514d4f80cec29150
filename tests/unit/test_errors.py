"""What every error says."""

from trimkv_export.errors import MissingDependencyError, missing


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    error = missing("reading images", "Pillow", "vision")
    assert isinstance(error, MissingDependencyError)
    assert str(error) == (
        "reading images needs the Python package Pillow; install it with: pip install 'trimkv-export[vision]'"
    )
    assert error.exit_code == 10
