"""Layouts of a training job before it runs: which are legal, what each rank needs, how long a step takes.

    job.py            a job's config, section by section
    rules.py          what must be legal together; a mapping becomes a job
    composition.py    jobs from overrides like parallel.pipe=4, composed by hydra from a folder of configs
    gpt_costs.py      times and bytes of a GPT, by a cost model
    measured.py       the same of a GPT under autocast, by its modules on the meta device
    hugging_face.py   the same of any Hugging Face model
    job_costs.py      a job in the terms of the cost model
    prediction.py     the simulated batch, and the memory of each rank
    report.py         a prediction as a table and as JSON
    search.py         all layouts of a number of devices, ranked by prediction

Nothing here imports torch or deepspeed, but for measured.py and hugging_face.py, which autocast and `layouts --model`
alone need.
"""
