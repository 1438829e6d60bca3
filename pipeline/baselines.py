"""Methods of scikit-learn that cross-validation compares a network with, on the same rows.

Each function builds an unfitted model for float64 rows with NaN for missing values; it may choose its settings by the inner folds.
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
    """Logistic regression on median-imputed, standardised measurements, with scikit-learn's default penalty."""
    return make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression())


def splines(inner: StratifiedKFold) -> GridSearchCV:
    """Logistic regression on cubic B-splines, linear beyond the outer knots, and on missing-value indicators.

    Knots and penalty are those with the lowest log loss over `inner`.
    """
    curves = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), SplineTransformer(extrapolation="linear"))
    features = FeatureUnion([("curves", curves), ("indicators", MissingIndicator(features="all"))])
    steps = Pipeline([("features", features), ("regression", LogisticRegression(solver="newton-cholesky"))])
    knots = "features__curves__splinetransformer__"
    choices = [
        {f"{knots}n_knots": [number], f"{knots}knots": [position], "regression__C": [0.3, 1, 3]}
        for number, position in ((3, "quantile"), (5, "uniform"))
    ]
    return GridSearchCV(steps, choices, scoring="neg_log_loss", cv=inner)


def boosting(_: StratifiedKFold) -> HistGradientBoostingClassifier:
    """Small gradient-boosted trees, which handle NaN themselves; they detect leakage of the target sooner than smooth models."""
    return HistGradientBoostingClassifier(max_iter=60, learning_rate=0.08, max_leaf_nodes=8, random_state=0)


BASELINES: dict[str, Callable[[StratifiedKFold], Any]] = {"logistic": logistic, "splines": splines, "boosting": boosting}
