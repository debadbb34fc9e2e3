"""What users read at the end: tables for the terminal and one page of HTML.

`values` holds the facts that a command hands over, `text` says how a number reads, `tables` and
`modes` make Rich renderables of them (from `cells`), `charts` places marks on axes, and `page`
writes the self-contained HTML file from the template beside it. Nothing here measures or decides
anything.
"""
