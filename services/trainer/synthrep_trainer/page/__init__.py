"""The page at `/`: generation, shards, training and probes on one sheet, as they happen.

    door          a browser's cookie becomes the key that every other client sends
    refusals      problems of the service around the page become HTML
    generator     what the page asks the generator, over REST and with the viewer's own key
    figures       numbers over steps to curves
    probe_charts  probes to scores over checkpoints, against what they have to beat
    comparisons   reports to tables of rows by labelled sets
    feature_map   a run's images on a plane
    sections      what each part of the page shows to one viewer
    forms         a form becomes the request that any client would send, and its curl command
    rendering     templates to HTML
    routes        the page, its parts, and the stream that keeps them fresh

Everything is rendered here; in the browser htmx puts it in place, and no other script runs.
"""
