"""Plans: what a mutation or an operation's begin and end change, and the events it makes.

Owns every guard and the order of events. Must not know how a plan is made durable or
sent. Invariant: a plan is a pure function of the view and its arguments; planning twice
gives the same plan, and a refused plan changes nothing.
"""
