import time
def nop(*a): pass
def cpu(*a): return time.process_time()
