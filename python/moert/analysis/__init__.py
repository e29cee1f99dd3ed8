"""What can be learnt about routers from statistics, apart from training them."""
