"""`python -m tools.pictures`: write the pictures into docs/images."""

from pathlib import Path

from tools.pictures import job_life, packages

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "docs" / "images"


def pictures() -> dict[str, str]:
    """File name -> content, for every picture."""
    return {"packages.svg": packages.draw(ROOT), "job-life.svg": job_life.draw()}


def main() -> None:
    for name, content in pictures().items():
        (DIRECTORY / name).write_text(content, encoding="utf-8")
        print((DIRECTORY / name).relative_to(ROOT))


if __name__ == "__main__":
    main()
