"""Statistics that merge exactly.

``spec``          which statistics are gathered.
``grid``          how float32 values map to bins: the top 16 bits, or fewer.

One value for each statistic of many tensors, with its laws of merging:

``entries``       sparse counters under integer keys, on which the histograms stand.
``largest``       the exact values of largest magnitude.
``values``        value -> count tables of tensors with few distinct values.
``channels``      extrema per channel.
``groups``        histograms per channel or group, on request, and what they will take.
``record``        all of these for many tensors, as one mergeable value.
``merger``        many records merged, one after the other, in little space.
``layout``        a record as plain arrays, for stores and digests.

How they are gathered:

``accumulator``   takes tensors and gives a record.
``sweep``         the one pass over a tensor, compiled.
``counters``      counters on demand, by the page.
``value_counts``  value tables while they are counted.
``group_counts``  group histograms while they are counted.
``kernels``       dense counting and the merging loops, compiled.
``compiled``      how loops are compiled; ``warm`` compiles them ahead of the first run.

How they are used:

``histogram``     the counts of one tensor, and what can be read off them.
``observer``      runs the tapped model over one shard and returns its record.
``sketch``        what single samples do to every tensor, in little space.
"""
