"""The documentation: its pages, one Markdown file per topic, and `site`, which builds the site of them."""
