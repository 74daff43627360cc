"""Does it learn? Runs that compare MoBA's quality with full attention's, their tables and pictures: docs/quality.md."""
