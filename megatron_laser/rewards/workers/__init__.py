"""Grading in processes that may hang, crash or be killed, each answer within its deadline.

Who talks to whom, from the caller to the user's code:

    GradingPool (`grading_pool`)        quick verdicts, shared results, what a failure counts as
      WorkerQueue (`worker_queue`)      one thread for each worker takes requests from one queue
        WorkerProcess (`worker_process`)  the pool's side of one process: start, ask with a deadline, kill
          ~ `messages` over a Unix socket ~
          `guard`                       the child: parent of the grader, kills everything that it leaves behind
            `worker_main`               the grader: runs the reward function, one request after the other

`source_snapshot` lets a worker that is started later run the code that the first one read; `user_code` names the line
of that code in messages.
"""
