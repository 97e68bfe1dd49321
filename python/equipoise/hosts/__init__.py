"""Engines that Equipoise runs inside, as their plugin. The only rooms that import them, and only when loaded there.

::

    sglang/   SGLang, through its entry-point group ``sglang.srt.plugins``
"""
