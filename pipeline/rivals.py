"""What a network of tabular rows is compared with in cross-validation, on the same rows: known methods from scikit-learn.

Each is made anew for a fold, with the inner folds for its own choices; it takes rows of float64, NaN where there is no value.
"""

from collections.abc import Callable
from typing import Any

from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler


def logistic(_: StratifiedKFold) -> Pipeline:
    """Plain logistic regression on measurements filled with the median and standardised, at scikit-learn's default penalty."""
    return make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression())


def splines(inner: StratifiedKFold) -> GridSearchCV:
    """Logistic regression on cubic B-splines, linear beyond the outer knots, and on flags of what was not measured.

    Knots and penalty are those of the least log loss over `inner`.
    """
    curves = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), SplineTransformer(extrapolation="linear"))
    features = FeatureUnion([("curves", curves), ("flags", MissingIndicator(features="all"))])
    steps = Pipeline([("features", features), ("regression", LogisticRegression(solver="newton-cholesky"))])
    knots = "features__curves__splinetransformer__"
    choices = [
        {f"{knots}n_knots": [number], f"{knots}knots": [where], "regression__C": [0.3, 1, 3]}
        for number, where in ((3, "quantile"), (5, "uniform"))
    ]
    return GridSearchCV(steps, choices, scoring="neg_log_loss", cv=inner)


def boosting(_: StratifiedKFold) -> HistGradientBoostingClassifier:
    """Small boosted trees, which take NaN as it is; they find any trace of the answer in the inputs sooner than smooth models."""
    return HistGradientBoostingClassifier(max_iter=60, learning_rate=0.08, max_leaf_nodes=8, random_state=0)


RIVALS: dict[str, Callable[[StratifiedKFold], Any]] = {"logistic": logistic, "splines": splines, "boosting": boosting}
