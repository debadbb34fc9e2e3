"""What to try next. Pure ask/tell objects: no Ray, no clock, and no files but a study's.

``trial``   candidates, finished trials, and how trials are ranked.
``results``  what is kept of a plan that was scored; ``ahead`` what may be asked for next.
``problem``  what a strategy is given; ``settings`` what the user says; ``building`` makes one.
``space``   what a layer may become; ``costs`` what that costs; ``latency`` a user's table.
``probing``  which groups to measure at the model's outputs.
``front``   the Pareto front of verified trials.
``pareto``  the default strategy: probe, solve, verify, correct. ``candidates`` are its groups,
            ``knapsack`` and ``lagrange`` solve for a budget and for many, ``correction`` learns.
``greedy``  hill climbing over groups of layers, most and least sensitive first.
``proposals``  what all strategies keep count of.
``icraft``  Icraft's three searches; ``icraft_measures``, ``icraft_ladders`` what they go by, and
``icraft_config`` their file. ``slimai``  SlimAI's smart search. ``knight``  Knight's sweep.
``vendors``  these and Optuna's, made from ``search.options``.
``optuna_study``  Optuna's samplers for what holds for the whole plan.
``strategies``  the strategies by name.
``pickers``   mixed precision without a search.
"""
