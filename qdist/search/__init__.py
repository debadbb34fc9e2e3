"""What to try next. Pure ask/tell objects: no Ray, no files, no clock.

``trial``   candidates, finished trials, and how trials are ranked.
``problem``  what a strategy is given.
``results``  what is kept of a plan that was scored; ``ahead`` what may be asked for next.
``greedy``  hill climbing over groups of layers, most and least sensitive first.
``strategies``  the strategies by name.
``pickers``   mixed precision without a search.
"""
