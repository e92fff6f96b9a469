"""``mlpint train``: trainer, configuration, tasks, data, models, metrics and reports.

An application of the packages below it, all of which it may import; nothing below imports it. Public: the command.
"""
