"""A comparison as people see it: table, page, picture, advice.

Public modules, which other rooms import::

    advice.py       From a comparison to a recommendation and the launch flags for it
    html.py         A comparison as one self-contained page
    picture.py      A comparison as one picture, for slides
    report_data.py  What page and picture show
    table.py        A comparison as a table of 80 columns, and as JSON

Private to this room::

    svg.py          Heat maps, curves and points for the page
"""
