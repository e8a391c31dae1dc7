"""Pairwise selection: a small set of cases in which every pair of levels of any two factors occurs together.

Greedy, as in Cohen et al., "The AETG system" (1997), but without random choices: every run selects the same.
"""

from itertools import combinations


def pairwise(**factors):
    """Cases (dicts of factor name to level) that together hold every pair of levels of every two factors."""
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rank = {name: position for position, name in enumerate(names)}

    def pair(one, other):
        return (one, other) if rank[one[0]] < rank[other[0]] else (other, one)

    cases = []
    while missing:
        chosen = dict(min(missing, key=lambda p: [(rank[name], level) for name, level in p]))
        for name in names:
            if name in chosen:
                continue
            levels = range(len(factors[name]))
            # Ties go to a level that changes from case to case, so that no level is left over for the end.
            start = len(cases) % len(levels)
            chosen[name] = max(
                (*levels[start:], *levels[:start]),
                key=lambda level, name=name: sum(pair((name, level), set_) in missing for set_ in chosen.items()),
            )
        missing -= {pair(one, other) for one, other in combinations(chosen.items(), 2)}
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases


def case_id(case):
    """A readable pytest id for a case."""
    return "-".join(f"{name}={value}".replace(" ", "").replace("torch.", "") for name, value in case.items())
